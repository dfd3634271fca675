"""layer_groups in modules of other packages: what is packed, and what is no layer, by what stands around it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layca_fast import FusedLayca, layer_groups

from ..support import random_gradients, resting, train, turning
from .test_left_out import Conv1D


class Around(nn.Module):
    """A module with these around in it: modules, parameters, and whatever else it tells."""

    def __init__(self, **things: Any) -> None:
        super().__init__()
        for name, thing in things.items():
            setattr(self, name, nn.Parameter(thing) if isinstance(thing, Tensor) else thing)


class Experts(Around):
    """A type whose name says what it holds."""


class TopKRouter(Around):
    """Another one."""


class RMSNormOfTheirs(Around):
    """No norm layer by its name."""


class GemmaRMSNorm(Around):
    """One."""


class CodeGenAttention(Around):
    """As transformers has it: with parts that lie interleaved."""

    __module__ = "transformers.models.codegen.modeling_codegen"


class FSDPCodeGenAttention(CodeGenAttention):
    """As sharding makes one of it."""


def linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)


@dataclass(frozen=True)
class Case:
    """What is made, the chunks of what rotates in it, the names of their parts, and a word of the plan."""

    name: str
    make: Callable[[], nn.Module]
    rotates: Mapping[str, Any]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


QKV, GLU = ("query", "key", "value"), ("gate", "up")

PACKED = (
    Case("thirds, by the inputs", lambda: Around(qkv=linear(6, 18)), {"qkv.weight": 3}, {"qkv.weight": QKV}),
    Case(
        "thirds, by what takes the outputs",
        lambda: Around(Wqkv=linear(6, 12), Wo=linear(4, 6)),
        {"Wqkv.weight": 3, "Wo.weight": 1},
        {"Wqkv.weight": QKV},
    ),
    Case(
        "grouped queries",
        lambda: Around(qkv_proj=linear(6, 16), o_proj=linear(8, 6), num_key_value_heads=2, head_dim=2),
        {"qkv_proj.weight": (8, 4, 4), "o_proj.weight": 1},
        {"qkv_proj.weight": QKV},
        {"qkv_proj.weight": "query (8), key (4), value (4)"},
    ),
    Case(
        "grouped queries, as the config tells",
        lambda: Around(c_attn=linear(8, 12), head_dim=2, config=SimpleNamespace(num_kv_heads=1)),
        {"c_attn.weight": (8, 2, 2)},
        {"c_attn.weight": QKV},
    ),
    Case(
        "sizes that nothing tells",
        lambda: Around(qkv=linear(8, 12)),
        {"qkv.weight": 1},
        {},
        {"qkv.weight": "packed, but of which sizes is unknown, so as one layer"},
    ),
    Case(
        "sizes that do not add up",
        lambda: Around(qkv_proj=linear(6, 18), o_proj=linear(8, 6), num_key_value_heads=2, head_dim=2),
        {"qkv_proj.weight": 1, "o_proj.weight": 1},
        {},
        {"qkv_proj.weight": "packed, but of which sizes is unknown, so as one layer"},
    ),
    Case(
        "interleaved by its name",
        lambda: Around(query_key_value=linear(6, 18), dense=linear(6, 6)),
        {"query_key_value.weight": 1, "dense.weight": 1},
        {},
        {"query_key_value.weight": "its parts lie interleaved, so as one layer"},
    ),
    Case(
        "interleaved by the type around it",
        lambda: nn.Sequential(CodeGenAttention(qkv_proj=linear(6, 18))),
        {"0.qkv_proj.weight": 1},
        {},
        {"0.qkv_proj.weight": "its parts lie interleaved, so as one layer"},
    ),
    Case(
        "interleaved by the type around it, sharded",
        lambda: nn.Sequential(FSDPCodeGenAttention(qkv_proj=linear(6, 18))),
        {"0.qkv_proj.weight": 1},
        {},
        {"0.qkv_proj.weight": "its parts lie interleaved, so as one layer"},
    ),
    Case("a convolution", lambda: Around(qkv=nn.Conv2d(4, 12, 1, bias=False)), {"qkv.weight": 1}),
    Case(
        "stored as (in, out)",
        lambda: Around(c_attn=Conv1D(12, 4), c_proj=Conv1D(4, 4)),
        {"c_attn.weight": 1, "c_proj.weight": 1},
        {},
        {
            "c_attn.weight": "query, key, value as one layer, for they are columns",
            "c_proj.weight": "stored as (in, out)",
        },
    ),
    Case(
        "columns, asked for",
        lambda: Around(c_attn=Conv1D(12, 4)),
        {"c_attn.weight": ("columns", 3)},
        {"c_attn.weight": QKV},
        {"c_attn.weight": "query, key, value"},
        {"rotate": {Conv1D: ("columns", 3)}},
    ),
    Case(
        "other columns, asked for",
        lambda: Around(c_attn=Conv1D(12, 4)),
        {"c_attn.weight": ("columns", (8, 4))},
        {},
        {"c_attn.weight": "stored as (in, out)"},
        {"rotate": {Conv1D: ("columns", [8, 4])}},
    ),
    Case(
        "key and value of cross-attention, stored as (in, out)",
        lambda: Around(c_attn=Conv1D(8, 4), q_attn=Conv1D(4, 4), c_proj=Conv1D(4, 4)),
        {"c_attn.weight": 1, "q_attn.weight": 1, "c_proj.weight": 1},
        {},
        {"c_attn.weight": "key, value as one layer, for they are columns"},
    ),
    Case(
        "key and value",
        lambda: Around(kv=linear(6, 8), q=linear(6, 4)),
        {"kv.weight": 2, "q.weight": 1},
        {"kv.weight": ("key", "value")},
    ),
    Case(
        "perhaps key and value",
        lambda: Around(kv_proj=linear(6, 8)),
        {"kv_proj.weight": 1},
        {},
        {"kv_proj.weight": "may be packed, so as one layer"},
    ),
    Case(
        "gate and up",
        lambda: Around(gate_up_proj=linear(4, 12), down_proj=linear(6, 4)),
        {"gate_up_proj.weight": 2, "down_proj.weight": 1},
        {"gate_up_proj.weight": GLU},
    ),
    Case(
        "a gated perceptron",
        lambda: Around(fc1=linear(4, 12), fc2=linear(6, 4)),
        {"fc1.weight": 2, "fc2.weight": 1},
        {"fc1.weight": GLU},
    ),
    Case("a perceptron", lambda: Around(fc1=linear(4, 12), fc2=linear(12, 4)), {"fc1.weight": 1, "fc2.weight": 1}),
    Case(
        "latent attention",
        lambda: Around(kv_a_proj_with_mqa=linear(6, 7), kv_b_proj=linear(5, 12), kv_lora_rank=5, qk_rope_head_dim=2),
        {"kv_a_proj_with_mqa.weight": (5, 2), "kv_b_proj.weight": 1},
        {"kv_a_proj_with_mqa.weight": ("latent", "rotary")},
    ),
    Case("asked for as one", lambda: Around(qkv=linear(6, 18)), {"qkv.weight": 1}, options={"rotate": {nn.Linear: 1}}),
    Case(
        "asked for without a number",
        lambda: Around(qkv=linear(6, 18)),
        {"qkv.weight": 3},
        {"qkv.weight": QKV},
        options={"rotate": [nn.Linear]},
    ),
    Case(
        "attention of torch",
        lambda: nn.MultiheadAttention(4, 2, bias=False),
        {"in_proj_weight": 3, "out_proj.weight": 1},
        {"in_proj_weight": QKV},
    ),
    Case(
        "experts",
        lambda: Experts(gate_up_proj=torch.randn(3, 10, 4), down_proj=torch.randn(3, 4, 5)),
        {"gate_up_proj": ("matrices", 2), "down_proj": 3},
        {"gate_up_proj": GLU},
        {"gate_up_proj": "gate and up of 3 experts", "down_proj": "experts"},
    ),
    Case(
        "experts, stored as (in, out)",
        lambda: Experts(gate_up_proj=torch.randn(3, 4, 10), down_proj=torch.randn(3, 5, 4)),
        {"gate_up_proj": 3, "down_proj": 3},
        {},
        {"gate_up_proj": "experts, gate and up as one"},
    ),
    Case(
        "experts, gate and up interleaved",
        lambda: Experts(gate_up_proj=torch.randn(3, 10, 4), down_proj=torch.randn(3, 4, 5), is_concatenated=False),
        {"gate_up_proj": 3, "down_proj": 3},
    ),
    Case(
        "experts in a module for each projection",
        lambda: Around(
            input_linear=Experts(weight=torch.randn(3, 10, 4)), output_linear=Experts(weight=torch.randn(3, 4, 5))
        ),
        {"input_linear.weight": ("matrices", 2), "output_linear.weight": 3},
        {"input_linear.weight": GLU},
    ),
    Case("experts of several blocks", lambda: Experts(w1=torch.randn(2, 3, 5, 4)), {"w1": "matrices"}),
    Case("experts by their number", lambda: Around(w1=torch.randn(3, 5, 4), num_experts=3), {"w1": 3}),
)


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_what_is_packed_is_cut_where_sizes_are_known_and_else_the_plan_says_so(case: Case, seed: int) -> None:
    model = case.make()
    groups = layer_groups(model, **case.options)
    assert turning(groups) == case.rotates
    named = {name: group.get("chunk_names", ()) for group in groups for name, _ in group["params"]}
    assert {name: parts for name, parts in named.items() if parts} == case.parts
    reasons = {row.name: row.reason for row in groups.rows}
    assert {name: reasons[name] for name in case.reasons} == case.reasons


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_each_part_keeps_a_norm_of_its_own(case: Case, seed: int) -> None:
    """And is named in the statistics."""
    model = case.make()
    groups = layer_groups(model, **case.options)
    optimizer = FusedLayca(groups, 0.1)
    rotating = [row for row in groups.rows if row.lr_factor is not None]
    train(optimizer, random_gradients([param for group in optimizer.param_groups for param in group["params"]], 1))
    for row in rotating:
        param = model.get_parameter(row.name)
        stats = optimizer.rotation_stats()[param]
        assert stats.angle.shape == (row.layers,)
        torch.testing.assert_close(stats.angle, torch.full_like(stats.angle, 0.1).atan())
        parts = case.parts.get(row.name, ())
        assert all(any(part in name for name in stats.layer_names) for part in parts)


class Router(Around):
    """The name of a whole model says nothing of its parts."""


NO_LAYERS = (
    ("router by its type", lambda: Around(gate=TopKRouter(weight=torch.randn(3, 4))), {"gate.weight": "router"}),
    (
        "router by the type around it",
        lambda: Around(router=TopKRouter(layer=linear(4, 3))),
        {"router.layer.weight": "router"},
    ),
    (
        "router beside a list",
        lambda: Around(gate=linear(4, 3), experts=nn.ModuleList(linear(4, 4) for _ in range(3))),
        {"gate.weight": "router"},
    ),
    (
        "router beside a stack",
        lambda: Around(gate=linear(4, 3), mlp=Experts(w1=torch.randn(3, 4, 4)), up=linear(4, 5)),
        {"gate.weight": "router"},
    ),
    (
        "positions and tokens",
        lambda: Around(
            pos_embed=torch.randn(1, 5, 4), cls_token=torch.randn(1, 1, 4), class_embedding=torch.randn(2, 4)
        ),
        {"pos_embed": "positional table", "cls_token": "token", "class_embedding": "embedding by its name"},
    ),
    (
        "positions of other names",
        lambda: Around(rel_pos_h=torch.randn(5, 4), relative_position_bias_table=torch.randn(9, 2)),
        {"rel_pos_h": "positional table", "relative_position_bias_table": "positional table"},
    ),
    ("scales of experts", lambda: Experts(scale=torch.ones(3, 1, 4)), {"scale": "unknown module type Experts"}),
    ("a norm layer by its name", lambda: GemmaRMSNorm(weight=torch.ones(4)), {"weight": "norm layer"}),
    (
        "a vector",
        lambda: RMSNormOfTheirs(weight=torch.ones(4), scale=torch.ones(1, 4)),
        {"weight": "vector", "scale": "vector"},
    ),
    (
        "an adapter",
        lambda: Around(
            lora_A=nn.ModuleDict({"default": linear(4, 2)}), lora_B=nn.ModuleDict({"default": linear(2, 4)})
        ),
        {"lora_B.default.weight": "LoRA's B, which starts at zero"},
    ),
    ("an adapter's own", lambda: Around(lora_B=torch.zeros(4, 2)), {"lora_B": "LoRA's B, which starts at zero"}),
)


@pytest.mark.parametrize(("make", "reasons"), [pytest.param(*rest, id=name) for name, *rest in NO_LAYERS])
@pytest.mark.filterwarnings("ignore:layer_groups. no layer of this")
def test_what_is_no_layer_is_known_by_its_type_its_name_or_its_neighbours(
    make: Callable[[], nn.Module], reasons: Mapping[str, str], seed: int
) -> None:
    model = make()
    assert resting(layer_groups(model)) == reasons
    # What is asked for rotates nevertheless, but for vectors.
    kinds = {type(module) for module in model.modules()} - {nn.ModuleList, nn.ModuleDict}
    asked = resting(layer_groups(model, rotate=kinds))
    assert set(asked.values()) <= {"token", "vector", "norm layer", "all zero"}


def test_a_model_that_is_called_a_router_is_none(seed: int) -> None:
    model = Router(layer=linear(4, 3), gate=linear(4, 4), experts=linear(4, 4))
    assert set(turning(layer_groups(model))) == {"layer.weight", "gate.weight", "experts.weight"}
