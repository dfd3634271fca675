"""A layer that was all zero when its groups were made does not change its rule when a run is resumed.

``layer_groups`` sets it aside by its present values. Made again on trained weights it does not, so the groups are not
those that were saved: the run goes on as it was, bit for bit, or is refused by the layer's name.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Optimizer

from layca_fast import FusedLayca, attach, layer_groups

from ..support import contents, params_of, same_bits


class Residual(nn.Module):
    """A branch that starts at zero, as LoRA's B does, before or after a matrix of its own shape."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.inner, self.branch, self.outer = (nn.Linear(5, 5, bias=bias) for _ in range(3))
        nn.init.zeros_(self.branch.weight)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.outer(x + self.branch(self.inner(x)))
        return made


Make = Callable[[nn.Module], Optimizer]


def attached(model: nn.Module, **options: Any) -> Optimizer:
    optimizer = SGD(layer_groups(model, lr=1e-2), lr=1e-2, **options)
    attach(optimizer)
    return optimizer


MAKERS: dict[str, Make] = {
    "momentum": lambda model: FusedLayca(layer_groups(model), lr=1e-2, momentum=0.9),
    "no momentum": lambda model: FusedLayca(layer_groups(model), lr=1e-2),
    "adam": lambda model: FusedLayca(layer_groups(model), lr=1e-2, base="adam"),
    "alpha": lambda model: FusedLayca(layer_groups(model, alpha=-0.3), lr=1e-2, momentum=0.9),
    "attached": lambda model: attached(model, momentum=0.9),
    "attached, no momentum": attached,
}

#: A norm that the branch reaches in the first three steps, or not in six.
LATER = {"reached": 1e-3, "not yet": 50.0}


def attached_later(model: nn.Module, joins_at: float) -> Optimizer:
    optimizer = SGD(layer_groups(model, lr=1e-2, zeros="rotate-later", joins_at=joins_at), lr=1e-2, momentum=0.9)
    attach(optimizer)
    return optimizer


def later(joins_at: float) -> Make:
    return lambda model: FusedLayca(layer_groups(model, zeros="rotate-later", joins_at=joins_at), lr=1e-2, momentum=0.9)


MAKERS |= {f"rotate later, {name}": later(norm) for name, norm in LATER.items()}
MAKERS |= {f"attached, rotate later, {name}": partial(attached_later, joins_at=norm) for name, norm in LATER.items()}

REACHED = [make for name, make in MAKERS.items() if name.endswith("rotate later, reached")]

every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
with_and_without_biases = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


def steps(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=draws)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def trained(make: Make, bias: bool, seed: int) -> tuple[nn.Module, Optimizer]:
    model = Residual(bias)
    optimizer = make(model)
    steps(model, optimizer, seed)
    return model, optimizer


def again(make: Make, model: nn.Module, bias: bool) -> tuple[nn.Module, Optimizer]:
    """A new model with the trained weights, and the groups that it gives now: those of the docs' old recipe."""
    resumed = Residual(bias)
    resumed.load_state_dict(model.state_dict())
    return resumed, make(resumed)


@with_and_without_biases
@every_maker
def test_load_state_dict_goes_on_bit_for_bit(make: Make, bias: bool, seed: int) -> None:
    model, optimizer = trained(make, bias, seed)
    resumed, other = again(make, model, bias)
    names = [group["param_names"] for group in optimizer.param_groups]
    assert [group["param_names"] for group in other.param_groups] != names
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["param_names"] for group in other.param_groups] == names
    steps(model, optimizer, seed + 1)
    steps(resumed, other, seed + 1)
    assert same_bits(contents(other), contents(optimizer))


@with_and_without_biases
def test_groups_of_the_start_are_followed_by_a_run_that_turned_the_layer(bias: bool, seed: int) -> None:
    """The other way round: groups made on trained weights were saved, and those of a new model set the layer aside."""
    make = MAKERS["momentum"]
    model = Residual(bias)
    nn.init.normal_(model.branch.weight)
    optimizer = make(model)
    steps(model, optimizer, seed)
    resumed = Residual(bias)
    other = make(resumed)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, seed + 1)
    steps(resumed, other, seed + 1)
    assert same_bits(contents(other), contents(optimizer))


def test_a_scheduler_goes_on_with_the_groups_that_were_saved(seed: int) -> None:
    make = MAKERS["momentum"]
    model = Residual(True)
    runs = [(model, make(model))]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(runs[0][1], 0.9)]
    steps(*runs[0], seed)
    schedulers[0].step()
    runs.append(again(make, model, True))
    schedulers.append(torch.optim.lr_scheduler.ExponentialLR(runs[1][1], 0.9))
    runs[1][1].load_state_dict(copy.deepcopy(runs[0][1].state_dict()))
    schedulers[1].load_state_dict(schedulers[0].state_dict())
    for (each, optimizer), scheduler in zip(runs, schedulers, strict=True):
        steps(each, optimizer, seed + 1)
        scheduler.step()
        steps(each, optimizer, seed + 2)
    assert same_bits(contents(runs[1][1]), contents(runs[0][1]))


def test_a_refused_checkpoint_leaves_the_groups_as_they_were(seed: int) -> None:
    model, optimizer = trained(MAKERS["momentum"], True, seed)
    _, other = again(MAKERS["momentum"], model, True)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["momentum_buffer"] = torch.zeros(2, 2)
    groups, before = other.param_groups, [group["param_names"] for group in other.param_groups]
    with pytest.raises(ValueError, match="momentum_buffer"):
        other.load_state_dict(saved)
    assert other.param_groups is groups
    assert [group["param_names"] for group in groups] == before
    assert not other.state


def test_a_refused_checkpoint_of_an_attached_optimizer_leaves_the_groups_as_they_were(seed: int) -> None:
    model, optimizer = trained(MAKERS["attached"], True, seed)
    _, other = again(MAKERS["attached"], model, True)
    saved = copy.deepcopy(optimizer.state_dict())
    key = next(key for key, state in saved["state"].items() if "radius" in state)
    saved["state"][key]["radius"].fill_(float("nan"))
    groups, before = other.param_groups, [group["param_names"] for group in other.param_groups]
    assert before != [group["param_names"] for group in saved["param_groups"]]
    with pytest.raises(ValueError, match="'radius' holds nan"):
        other.load_state_dict(saved)
    assert other.param_groups is groups
    assert [group["param_names"] for group in groups] == before


def test_groups_that_do_not_match_are_refused_with_the_cause(seed: int) -> None:
    """Without names on one side, or with other names, nothing can be put right."""
    model, optimizer = trained(MAKERS["momentum"], True, seed)
    _, other = again(MAKERS["momentum"], model, True)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["param_names"]
    with pytest.raises(ValueError, match=r"\[2, 4\].*\[3, 3\].*all zero.*before the weights are loaded"):
        other.load_state_dict(saved)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["param_names"][0] = "gone.weight"
    with pytest.raises(ValueError, match=r"lacks \['inner\.weight'\], and \['gone\.weight'\] are not in this"):
        other.load_state_dict(saved)


OPTIONS: dict[str, dict[str, Any]] = {
    "nested": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "broadcast": {"full_state_dict": True, "broadcast_from_rank0": True},
}

through_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@through_options
@with_and_without_biases
@every_maker
def test_distributed_state_dicts_are_refused_by_name(
    make: Make, bias: bool, options: dict[str, Any], one_process: None, seed: int
) -> None:
    """They are shared out over the groups that there are, whose options are then those of any of the saved ones."""
    model, optimizer = trained(make, bias, seed)
    through = StateDictOptions(**options)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=through))
    resumed, other = again(make, model, bias)
    refused: Exception | None = None
    try:
        set_optimizer_state_dict(resumed, other, saved, options=through)
    except (ValueError, KeyError) as error:
        refused = error
    if isinstance(refused, ValueError):
        assert "branch.weight" in str(refused)
        assert "all zero" in str(refused)
    elif refused is not None:
        # torch itself: lists of names of another length in full state dicts, options that another group lacks in flat.
        assert options in ({"full_state_dict": True}, {"flatten_optimizer_state_dict": True})
        assert any(each in str(refused) for each in ("param_names", "branch.weight", "joins_at"))
    else:
        # Where every layer has a group of its own, it keeps its options; and what has joined turns as others do.
        assert make in (MAKERS["alpha"], *REACHED)
        steps(model, optimizer, seed + 1)
        steps(resumed, other, seed + 1)
        theirs = dict(model.named_parameters())
        assert all(same_bits(param.detach(), theirs[name].detach()) for name, param in resumed.named_parameters())


@through_options
@with_and_without_biases
@every_maker
def test_distributed_state_dicts_go_on_with_groups_of_the_start(
    make: Make, bias: bool, options: dict[str, Any], one_process: None, seed: int
) -> None:
    """The recipe: groups first, then weights."""
    model, optimizer = trained(make, bias, seed)
    through = StateDictOptions(**options)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=through))
    resumed = Residual(bias)
    other = make(resumed)
    resumed.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed, other, saved, options=through)
    steps(model, optimizer, seed + 1)
    steps(resumed, other, seed + 1)
    assert same_bits(contents(other), contents(optimizer))
    names = [group["param_names"] for group in optimizer.param_groups]
    assert [group["param_names"] for group in other.param_groups] == names


@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}], ids=["nested", "flat"])
@pytest.mark.parametrize("make", [make for name, make in MAKERS.items() if "later" not in name])
def test_distributed_files_name_the_layer(
    make: Make, options: dict[str, Any], tmp_path: Path, one_process: None, seed: int
) -> None:
    """torch itself misses what the layer does not have, before anything is loaded."""
    model, optimizer = trained(make, True, seed)
    through = StateDictOptions(**options)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=through)}, checkpoint_id=tmp_path)
    resumed, other = again(make, model, True)
    found = {"optimizer": get_optimizer_state_dict(resumed, other, options=through)}
    with pytest.raises(dcp.api.CheckpointException, match=r"branch\.weight|param_groups"):
        dcp.load(found, checkpoint_id=tmp_path)


@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}], ids=["nested", "flat"])
def test_unnamed_groups_are_refused_by_who_has_a_radius(options: dict[str, Any], one_process: None, seed: int) -> None:
    def unnamed(model: nn.Module) -> FusedLayca:
        groups = [{**g, "params": [p for _, p in g["params"]]} for g in layer_groups(model)]
        return FusedLayca(groups, lr=1e-2, momentum=0.9)

    model, optimizer = trained(unnamed, True, seed)
    through = StateDictOptions(**options)
    saved = get_optimizer_state_dict(model, optimizer, options=through)
    resumed, other = again(unnamed, model, True)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 are not those that were saved"):
        set_optimizer_state_dict(resumed, other, saved, options=through)


def test_a_pipeline_of_other_stages_still_loads(one_process: None, seed: int) -> None:
    """What flat state dicts are for: each stage saved groups of its own, of fewer parameters."""
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(4)))
    through = StateDictOptions(flatten_optimizer_state_dict=True)
    saved: dict[str, Any] = {}
    for half in ("0 1", "2 3"):
        params = [(f"{name}.weight", model[int(name)].weight) for name in half.split()]
        stage = FusedLayca(params, 1e-2, momentum=0.9)
        for _, param in params:
            param.grad = torch.randn_like(param)
        stage.step()
        stage.zero_grad()
        saved |= get_optimizer_state_dict(model, stage, options=through)
    whole = FusedLayca(model.named_parameters(), 1e-2, momentum=0.9)
    set_optimizer_state_dict(model, whole, saved, options=through)
    for name, param in model.named_parameters():
        assert same_bits(whole.state[param]["radius"], saved[f"state.{name}.radius"])
    assert whole.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


def test_names_win_over_positions(seed: int) -> None:
    """The same groups in another order of modules: torch would hand equal shapes each other's state."""
    first, second = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    optimizer = FusedLayca([("first", first), ("second", second)], 0.1, momentum=0.9)
    for param in params_of(optimizer):
        param.grad = torch.randn_like(param)
    optimizer.step()
    other = FusedLayca([("second", second), ("first", first)], 0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    for param in (first, second):
        assert same_bits(other.state[param], optimizer.state[param])
