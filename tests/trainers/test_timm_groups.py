"""Param groups as timm makes them for the parameters of a model that is smaller than any of timm's."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layca_fast import FusedLayca

from ..support import copy_of, norm_of, params_of, random_gradients, relative_distance, same_bits, train
from .loops import assert_turned
from .recipes import recipes

LR, DECAY = 0.02, 0.1

pytestmark = pytest.mark.usefixtures("torchvision")
Group = dict[str, Any]


class VisionTransformer(nn.Module):
    """Names and shapes of timm's, as far as its groups look at them."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 5, 8))
        self.patch_embed = nn.Conv2d(3, 8, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))
        self.head = nn.Linear(8, 3)


def exempt(name: str, param: Tensor) -> bool:
    return param.dim() <= 1 or name.endswith(".bias") or name in ("pos_embed", "cls_token")


def weight_decay_groups(model: nn.Module) -> list[Group]:
    """As of ``timm.optim.param_groups_weight_decay``, with a group for its fallback optimizer."""
    named = dict(model.named_parameters())
    simple = {"head.weight"}
    return [
        {"params": [p for name, p in named.items() if exempt(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in named.items() if not exempt(name, p) and name not in simple], "weight_decay": 0.1},
        {"params": [named[name] for name in simple], "weight_decay": 0.1, "simple": True},
    ]


def layer_decay_groups(model: nn.Module) -> list[Group]:
    """As of ``timm.optim.param_groups_layer_decay``: stem, two blocks and head, each with and without decay."""
    groups: dict[tuple[int, bool], Group] = {}
    for name, param in model.named_parameters():
        layer = 3 if name.startswith("head") else 1 + int(name.split(".")[1]) if name.startswith("blocks") else 0
        key = layer, exempt(name, param)
        decay = 0.0 if key[1] else DECAY
        groups.setdefault(key, {"lr_scale": 0.75 ** (3 - layer), "weight_decay": decay, "params": []})
        groups[key]["params"].append(param)
    return list(groups.values())


def set_rates(groups: Sequence[Group], value: float) -> None:
    """As timm's schedulers do, at every step."""
    for group in groups:
        group["lr"] = value * group["lr_scale"] if "lr_scale" in group else value


def as_rotations(groups: Sequence[Group]) -> list[Group]:
    """The recipe's."""
    names: dict[str, Any] = {}
    exec(recipes()["timm's groups"], names)
    return names["as_rotations"](groups)


MATRICES = ("patch_embed.weight", "blocks.0.1.weight", "blocks.1.1.weight", "head.weight")
MAKERS = (
    pytest.param(weight_decay_groups, (1.0, 1.0, 1.0, 1.0), id="weight decay"),
    pytest.param(layer_decay_groups, (0.75**3, 0.75**2, 0.75, 1.0), id="layer decay"),
)


@pytest.mark.parametrize(("make", "scales"), MAKERS)
def test_every_matrix_turns_by_its_own_rate(
    make: Callable[[nn.Module], list[Group]], scales: tuple[float, ...], seed: int
) -> None:
    """And nothing that timm exempts from decay; class tokens start at zero, which cannot turn."""
    model = VisionTransformer()
    optimizer = FusedLayca(as_rotations(make(model)), LR, base="adam")
    for step, row in enumerate(random_gradients(params_of(optimizer), 4)):
        rate = LR * (1 - step / 4)
        set_rates(optimizer.param_groups, rate)
        before = copy_of(dict(model.named_parameters()))
        train(optimizer, [row])
        named = dict(model.named_parameters())
        assert [name for name in named if "radius" in optimizer.state[named[name]]] == list(MATRICES)
        assert not any(same_bits(before[name], param) for name, param in named.items())
        for name, scale in zip(MATRICES, scales, strict=True):
            assert_turned(before[name], named[name], rate * scale)
            assert norm_of(named[name]) == pytest.approx(norm_of(before[name]))


def test_decay_and_rates_by_group_are_adamws(seed: int) -> None:
    """Where nothing rotates: groups as timm gives them to any optimizer."""
    model, twin = VisionTransformer(), VisionTransformer()
    twin.load_state_dict(model.state_dict())
    ours = FusedLayca(layer_decay_groups(model), LR, base="adam", rotate=False)
    theirs = torch.optim.AdamW(layer_decay_groups(twin), LR)
    for step, row in enumerate(random_gradients(params_of(ours), 5)):
        for optimizer in (ours, theirs):
            set_rates(optimizer.param_groups, LR / (1 + step))
            train(optimizer, [row])
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_distance(param, other) <= 1e-6


def test_groups_that_are_not_prepared_are_told_so(seed: int) -> None:
    """Decay of what rotates is ignored, with a warning; a class token, a vector, is trained from its zeros."""
    model = VisionTransformer()
    optimizer = FusedLayca(layer_decay_groups(model), LR)
    row = random_gradients(params_of(optimizer), 1)
    with pytest.warns(UserWarning, match=r"weight_decay=0\.1 is ignored for parameter 0 of group 1"):
        train(optimizer, row)
    assert bool(model.cls_token.any())
