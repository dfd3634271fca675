"""Numbers that schedulers compute: what misses zero by rounding is zero, and what is wrong is told with its step."""

import copy
import math
import pickle
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler

from layca_fast import FusedLayca, attach, layer_groups
from layca_fast.formulas.base_options import ROUNDING

from ..support import clones, contents, every_backend, native_backends, parameter, random_gradients, same_bits, train

TINY = -1e-18


def test_a_linear_schedule_down_to_zero_may_end_below_it(seed: int) -> None:
    """As torch's LinearLR does by 1e-17; the checkpoint that is written there can be loaded."""
    missed = 0
    for total in range(2, 60):
        param = parameter(3, 4)
        optimizer = FusedLayca([param], 0.3, backend="torch")
        scheduler = lr_scheduler.LinearLR(optimizer, 1 / 3, end_factor=0.0, total_iters=total)
        for grads in random_gradients([param], total):
            train(optimizer, [grads])
            scheduler.step()
        lr = optimizer.param_groups[0]["lr"]
        if lr < 0:
            missed += 1
            before = contents(optimizer)[0][0]
            train(optimizer, random_gradients([param], 1))
            assert same_bits(contents(optimizer)[0][0], before)
            other = FusedLayca([parameter(3, 4)], 0.3, backend="torch")
            other.load_state_dict(optimizer.state_dict())
            assert other.param_groups[0]["lr"] == lr
    assert missed > 0, "torch's schedules have become exact: find another one"


ZEROS: dict[str, tuple[dict[str, Any], Any]] = {
    "lr": ({"momentum": 0.9}, "lr"),
    "lr of adam": ({"base": "adam"}, "lr"),
    "momentum": ({"momentum": 0.9}, "momentum"),
    "momentum of sgd_amom": ({"base": "sgd_amom"}, "momentum"),
    "momentum of rmsprop": ({"base": "rmsprop", "momentum": 0.9}, "momentum"),
    "alpha": ({"base": "rmsprop"}, "alpha"),
    "betas of adam": ({"base": "adam"}, "betas"),
    "first beta of lion": ({"base": "lion"}, "betas"),
    "weight_decay": ({"rotate": False, "weight_decay": 0.1}, "weight_decay"),
}


@pytest.mark.parametrize("size", [TINY, -ROUNDING], ids=str)
@pytest.mark.parametrize(("options", "name"), ZEROS.values(), ids=ZEROS.keys())
@native_backends
def test_what_misses_zero_by_rounding_takes_the_steps_of_zero(
    backend: str, options: dict[str, Any], name: str, size: float, seed: int
) -> None:
    params = [parameter(4, 3, backend=backend), parameter(5, backend=backend)]
    twins = clones(params)
    ours, theirs = (FusedLayca(each, **{"lr": 0.1, **options}, backend=backend) for each in (params, twins))
    first, then = random_gradients(params, 2), random_gradients(params, 3)
    for optimizer, value in ((ours, size), (theirs, 0.0)):
        train(optimizer, first)
        group = optimizer.param_groups[0]
        group[name] = (value, 0.5) if name == "betas" else value
        train(optimizer, then)
    assert same_bits(contents(ours), contents(theirs))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@every_backend
def test_a_rate_of_rounding_size_leaves_every_bit(backend: str, as_tensor: bool, seed: int) -> None:
    param = parameter(4, 3, backend=backend)
    lr = torch.tensor(TINY) if as_tensor else TINY
    optimizer = FusedLayca([param], lr, momentum=0.9, backend=backend)
    before = param.detach().clone()
    train(optimizer, random_gradients([param], 2))
    assert same_bits(param.detach(), before)


def test_layers_of_zeros_rest_at_such_a_rate(seed: int) -> None:
    """Checkpoints make the state at a rate of zero, by weights that are loaded only then."""
    param = Parameter(torch.zeros(3, 4))
    train(FusedLayca([param], TINY, backend="torch"), random_gradients([param], 1))


def test_groups_and_their_factors_take_such_rates(seed: int) -> None:
    groups = layer_groups(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), TINY, alpha=0.5)
    assert [group["lr"] for group in FusedLayca(groups).param_groups] == [group["lr"] for group in groups]


def test_attach_takes_them(seed: int) -> None:
    param = parameter(4, 3)
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    attach(optimizer)
    train(optimizer, random_gradients([param], 2))
    optimizer.param_groups[0]["lr"] = TINY
    before = param.detach().clone()
    train(optimizer, random_gradients([param], 2))
    assert same_bits(param.detach(), before)


def test_no_weight_decay_is_warned_of_that_is_only_rounding(seed: int) -> None:
    """Warnings are errors here."""
    param = parameter(4, 3)
    optimizer = FusedLayca([param], 0.1, weight_decay=TINY)
    train(optimizer, random_gradients([param], 1))


WRONG: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lr": ({}, {"lr": -2 * ROUNDING}),
    "lr in a tensor": ({}, {"lr": torch.tensor(-1e-3)}),
    "momentum": ({}, {"momentum": -1e-3}),
    "momentum of 1": ({"base": "sgd_amom"}, {"momentum": 1.0}),
    "betas of 1": ({"base": "adam"}, {"betas": (1.0, 0.999)}),
    "betas a rounding above 1": ({"base": "adam"}, {"betas": (0.9, 1.0 + 2**-52)}),
    "alpha": ({"base": "rmsprop"}, {"alpha": -1e-3}),
    "weight_decay": ({}, {"weight_decay": math.nan}),
}

every_way_to_step = pytest.mark.parametrize("way", ["plain", "copied", "pickled", "in backward", "attached"])


def stepping(way: str, options: dict[str, Any]) -> Optimizer:
    """An optimizer whose fourth step is the next."""
    params = [parameter(4, 3), parameter(3, 3)]
    optimizer: Optimizer
    if way == "attached":
        optimizer = torch.optim.SGD([{"params": [each]} for each in params], lr=0.1)
        attach(optimizer)
    else:
        optimizer = FusedLayca([{"params": [each]} for each in params], 0.1, backend="torch", **options)
    if way == "in backward":
        assert isinstance(optimizer, FusedLayca)
        optimizer.step_in_backward()
    for _ in range(3):
        loss(optimizer).backward()
        optimizer.step()
    optimizer.zero_grad()
    if way == "copied":
        return copy.deepcopy(optimizer)
    return pickle.loads(pickle.dumps(optimizer)) if way == "pickled" else optimizer


def loss(optimizer: Optimizer) -> torch.Tensor:
    return sum((param.square().sum() for group in optimizer.param_groups for param in group["params"]), torch.zeros(()))


@every_way_to_step
@pytest.mark.parametrize(("options", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_what_a_schedule_led_to_is_judged_when_it_is_used(
    way: str, options: dict[str, Any], wrong: dict[str, Any], seed: int
) -> None:
    """With the number of the step and of the group; what is mended before a step was never wrong."""
    if way == "attached" and "lr" not in wrong:
        # The other optimizer's own options are its own to judge.
        wrong = {"lr": -0.5}
    optimizer = stepping(way, options)
    (name,) = wrong
    good = {name: optimizer.param_groups[1][name]}
    optimizer.param_groups[1].update(wrong)
    optimizer.param_groups[1].update(good)
    loss(optimizer).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[1].update(wrong)
    before = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]

    def fifth_step() -> None:
        loss(optimizer).backward()
        optimizer.step()

    with pytest.raises(ValueError, match=rf"{name}=.*; found at step 5, in group 1$"):
        fifth_step()
    after = [param.detach() for group in optimizer.param_groups for param in group["params"]]
    assert same_bits(after, before)


def test_the_docs_say_what_counts_as_rounding() -> None:
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "learning_rate.md").read_text(encoding="utf-8")
    assert re.search(rf"-{ROUNDING:.0e}".replace("e-0", "e-0?"), text)
