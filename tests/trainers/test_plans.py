"""layer_groups on the architectures of transformers and peft: docs/plans.md, and training by those plans."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from layca_fast import FusedLayca, attach, layer_groups
from layca_fast.groups.plan import LayerGroups

from ..docs.support import ROOT
from ..docs.test_pages import script
from ..support import norm_of, turning


@pytest.fixture(scope="module")
def plans() -> ModuleType:
    """docs/make_plans.py"""
    return script(ROOT / "docs" / "make_plans.py")


def made(plans: ModuleType, title: str) -> nn.Module:
    (family,) = (each for each in plans.FAMILIES if each.title == title)
    model: nn.Module = family.make()
    return model


def test_the_page_of_plans_is_up_to_date(plans: ModuleType) -> None:
    """make plans writes it."""
    text = plans.render()
    assert plans.TARGET.read_text(encoding="utf-8") == text
    assert "unknown" not in text.partition("\n## ")[2]


TOKENS = {"input_ids": (2, 8), "labels": (2, 8)}

#: Models of different kinds of packing, with the shapes of the tokens that they take.
TRAINED: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "GPT-2": TOKENS,
    "Phi-3": TOKENS,
    "Qwen3-MoE": TOKENS,
    "DeepSeek-V3": TOKENS,
    "T5": TOKENS,
    "LoRA": TOKENS,
}


def columns(model: nn.Module) -> dict[Any, Any]:
    """What docs/plans.md has for GPT-2."""
    return {block.attn.c_attn: ("columns", 3) for block in model.transformer.h}


def parts(param: Tensor, chunks: Any) -> list[Tensor]:
    """The layers that ``chunks`` makes of a tensor, by torch's own means."""
    if isinstance(chunks, tuple) and chunks[0] == "matrices":
        return [part for matrix in param.flatten(0, -3) for part in matrix.chunk(chunks[1])]
    if isinstance(chunks, tuple) and chunks[0] == "columns":
        return list(param.chunk(chunks[1], dim=1))
    return list(param.split(chunks) if isinstance(chunks, tuple) else param.chunk(chunks))


def norms(param: Tensor, chunks: Any) -> list[float]:
    return [norm_of(part) for part in parts(param.detach(), chunks)]


def fused(groups: LayerGroups) -> Optimizer:
    return FusedLayca(groups, base="adam")


def attached(groups: LayerGroups) -> Optimizer:
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    attach(optimizer)
    return optimizer


@pytest.mark.parametrize("make", [fused, attached])
@pytest.mark.parametrize("title", [*TRAINED, "GPT-2, by columns"])
def test_models_train_by_their_plans(
    plans: ModuleType, title: str, make: Callable[[LayerGroups], Optimizer], seed: int
) -> None:
    """Each layer, and each part of a packed one, keeps its norm; all tensors that get a gradient move."""
    # Without dropout the loss falls, step by step, on tokens that stay the same.
    title, _, asked = title.partition(", ")
    model = made(plans, title).eval()
    groups = layer_groups(model, 0.02, others_lr=1e-3, rotate=columns(model) if asked else {})
    chunks = turning(groups)
    assert bool(asked) == (("columns", 3) in chunks.values())
    optimizer = make(groups)
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    before = {name: norms(named[name], each) for name, each in chunks.items()}
    start = {name: param.detach().clone() for name, param in named.items()}
    batch = {name: torch.randint(3, 96, shape) for name, shape in TRAINED[title].items()}
    losses = []
    has_gradient: set[str] = set()
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        has_gradient |= {name for name, param in named.items() if param.grad is not None and param.grad.any()}
        optimizer.step()
        losses.append(float(loss.detach()))
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < losses[0]
    for name, each in chunks.items():
        assert norms(named[name], each) == pytest.approx(before[name], rel=1e-5), name
    assert {name for name, param in named.items() if not torch.equal(param, start[name])} == has_gradient


def test_adapters_have_the_same_plan_once_they_are_trained(plans: ModuleType, seed: int) -> None:
    """B, which starts at zero, is none then: a run that is resumed makes its groups anew."""
    model = made(plans, "LoRA")
    at_first = layer_groups(model)
    optimizer = FusedLayca(at_first, 0.1)
    for _ in range(2):
        model(**{name: torch.randint(3, 96, shape) for name, shape in TOKENS.items()}).loss.backward()
        optimizer.step()
    grown = [param for name, param in model.named_parameters() if "lora_B" in name]
    assert all(param.any() for param in grown)
    assert str(layer_groups(model)) == str(at_first)
    assert turning(layer_groups(model)) == turning(at_first)


@pytest.mark.parametrize("title", ["Phi-3", "Qwen3-MoE", "DeepSeek-V3"])
def test_sharding_does_not_change_the_plan(plans: ModuleType, title: str, seed: int) -> None:
    """FSDP2 gives every module that it wraps a type of its own, and every parameter another."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = made(plans, title)
        plain = layer_groups(model, 0.02)
        mesh = init_device_mesh("cpu", (1,))
        holders = [each for each in model.modules() if next(each.children(), None) is not None]
        for module in reversed([each for each in holders if not isinstance(each, nn.ModuleList)]):
            fully_shard(module, mesh=mesh)
        sharded = layer_groups(model, 0.02)
        assert str(sharded) == str(plain)
        before = {name: param.full_tensor() for name, param in model.named_parameters()}
        for param in model.parameters():
            param.grad = (100 * param.detach()).cos()
        FusedLayca(sharded).step()
        for name, chunks in turning(sharded).items():
            after = norms(model.get_parameter(name).full_tensor(), chunks)
            assert after == pytest.approx(norms(before[name], chunks), rel=1e-5), name
    finally:
        distributed.destroy_process_group()
