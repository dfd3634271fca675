"""layer_groups: what rotates in each module type, in how many layers, and why the rest does not."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from layca_fast import layer_groups

from ..support import Unknown, resting, turning


class Adapted(nn.Linear):
    """A known type with a matrix of its own."""

    def __init__(self) -> None:
        super().__init__(24, 24)
        self.lora_A = nn.Parameter(torch.randn(2, 24))


class Experts(nn.Module):
    """As transformers stacks them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))


def initialized_lazy() -> nn.Module:
    module = nn.LazyLinear(3)
    module(torch.randn(2, 5))
    return module


@dataclass(frozen=True)
class Kind:
    """A module, the chunks of what rotates in it, and for some of its other parameters the reason."""

    name: str
    make: Callable[[], nn.Module]
    rotates: Mapping[str, Any]
    reasons: Mapping[str, str]
    options: Mapping[str, Any] | None = None


BIAS = {"bias": "bias"}
WEIGHT = {"weight": 1}
NORM = {"weight": "norm layer", "bias": "norm layer"}


def gates(chunks: int, suffixes: Iterable[str]) -> dict[str, int]:
    return {f"weight_{kind}{suffix}": chunks for suffix in suffixes for kind in ("ih", "hh")}


def biases(suffixes: Iterable[str]) -> dict[str, str]:
    return {f"bias_{kind}{suffix}": "bias" for suffix in suffixes for kind in ("ih", "hh")}


BOTH_WAYS = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")

KINDS = (
    Kind("Linear", lambda: nn.Linear(3, 4), WEIGHT, BIAS),
    Kind("initialized LazyLinear", initialized_lazy, WEIGHT, BIAS),
    Kind("Bilinear", lambda: nn.Bilinear(3, 4, 2), WEIGHT, BIAS),
    *(Kind(kind.__name__, lambda kind=kind: kind(2, 4, 3), WEIGHT, BIAS) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    *(
        Kind(kind.__name__, lambda kind=kind: kind(2, 4, 3), WEIGHT, BIAS)
        for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    ),
    Kind(
        "MultiheadAttention",
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
        {"in_proj_weight": 3, "out_proj.weight": 1},
        {"in_proj_bias": "bias", "bias_k": "bias", "bias_v": "bias", "out_proj.bias": "bias"},
    ),
    Kind(
        "MultiheadAttention, other key and value sizes",
        lambda: nn.MultiheadAttention(4, 2, kdim=5, vdim=6, bias=False),
        {"q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1, "out_proj.weight": 1},
        {},
    ),
    Kind("RNN", lambda: nn.RNN(3, 4), gates(1, ["_l0"]), biases(["_l0"])),
    Kind("GRU", lambda: nn.GRU(3, 4, 2, bidirectional=True), gates(3, BOTH_WAYS), biases(BOTH_WAYS)),
    Kind(
        "LSTM with projection",
        lambda: nn.LSTM(3, 4, proj_size=2, bidirectional=True),
        {
            **gates(4, ["_l0"]),
            "weight_hr_l0": 1,
            **gates(4, ["_l0_reverse"]),
            "weight_hr_l0_reverse": 1,
        },
        biases(["_l0", "_l0_reverse"]),
    ),
    Kind("RNNCell", lambda: nn.RNNCell(3, 4), gates(1, [""]), biases([""])),
    Kind("GRUCell", lambda: nn.GRUCell(3, 4), gates(3, [""]), biases([""])),
    Kind("LSTMCell", lambda: nn.LSTMCell(3, 4), gates(4, [""]), biases([""])),
    Kind("Embedding", lambda: nn.Embedding(5, 3), {}, {"weight": "embedding"}),
    Kind("EmbeddingBag", lambda: nn.EmbeddingBag(5, 3), {}, {"weight": "embedding"}),
    Kind("Embedding, asked", lambda: nn.Embedding(5, 3), WEIGHT, {}, {"embeddings": True}),
    Kind("EmbeddingBag, asked", lambda: nn.EmbeddingBag(5, 3), WEIGHT, {}, {"embeddings": True}),
    *(Kind(kind.__name__, lambda kind=kind: kind(4), {}, NORM) for kind in (nn.BatchNorm1d, nn.BatchNorm2d)),
    *(Kind(kind.__name__, lambda kind=kind: kind(4), {}, NORM) for kind in (nn.BatchNorm3d, nn.SyncBatchNorm)),
    Kind("InstanceNorm2d", lambda: nn.InstanceNorm2d(4, affine=True), {}, NORM),
    Kind("GroupNorm", lambda: nn.GroupNorm(2, 4), {}, NORM),
    Kind("LayerNorm of a matrix", lambda: nn.LayerNorm((4, 5)), {}, NORM),
    Kind("RMSNorm of a matrix", lambda: nn.RMSNorm((4, 5)), {}, {"weight": "norm layer"}),
    Kind("PReLU", lambda: nn.PReLU(3), {}, {"weight": "vector"}),
    Kind(
        "weight_norm",
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        {},
        {
            **BIAS,
            "parametrizations.weight.original0": "parametrized",
            "parametrizations.weight.original1": "parametrized",
        },
    ),
    Kind(
        "unknown type",
        Unknown,
        {},
        {"weight": "unknown module type Unknown", "scale": "scalar", "gain": "vector", "bias": "bias"},
    ),
    Kind(
        "unknown type, asked",
        Unknown,
        WEIGHT,
        {"scale": "scalar", "gain": "vector", "bias": "bias"},
        {"rotate": [Unknown]},
    ),
    Kind(
        "unknown type, asked with chunks",
        Unknown,
        {"weight": "all"},
        {"scale": "scalar", "gain": "vector", "bias": "bias"},
        {"rotate": {Unknown: "all"}},
    ),
    Kind("known type, other chunks", lambda: nn.Linear(3, 4), {"weight": 2}, BIAS, {"rotate": {nn.Linear: 2}}),
    Kind("sizes", lambda: nn.Linear(3, 9), {"weight": (4, 3, 2)}, BIAS, {"rotate": {nn.Linear: [4, 3, 2]}}),
    Kind("columns", lambda: nn.Linear(3, 4), {"weight": "columns"}, BIAS, {"rotate": {nn.Linear: "columns"}}),
    Kind(
        "stacked experts",
        Experts,
        {"gate_up_proj": ("matrices", 2), "down_proj": ("matrices", 2)},
        {},
        {"rotate": {Experts: ("matrices", 2)}},
    ),
    Kind("subclass", Adapted, WEIGHT, {**BIAS, "lora_A": "unknown parameter of Adapted"}),
    Kind("subclass, asked", Adapted, {"weight": 1, "lora_A": 1}, BIAS, {"rotate": [Adapted]}),
    Kind(
        "packed type, asked without chunks",
        lambda: nn.MultiheadAttention(4, 2, bias=False),
        {"in_proj_weight": 3, "out_proj.weight": 1},
        {},
        {"rotate": (nn.MultiheadAttention,)},
    ),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_rotates_in_each_module_type(kind: Kind, seed: int) -> None:
    nothing = pytest.warns(UserWarning, match=r"layer_groups: no layer of this \w+ rotates")
    with nullcontext() if kind.rotates else nothing:
        groups = layer_groups(kind.make(), **(kind.options or {}))
    assert turning(groups) == kind.rotates
    assert resting(groups) == kind.reasons
