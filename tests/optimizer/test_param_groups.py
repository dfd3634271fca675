"""Param groups: their options, their names, their warnings, and groups that come and go while a run goes on."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from layca_fast import FusedLayca
from layca_fast.commands.verify import angle_between

from ..support import contents, copy_of, every_backend, parameter, random_gradients, same_bits, train


@every_backend
def test_a_group_added_mid_run_with_its_own_base_trains_as_on_its_own(backend: str, seed: int) -> None:
    """The groups share batches where their formulas agree; neither may see the other's hyperparameters."""
    weights = [parameter(5, 4, backend=backend), parameter(3, 3, 2, backend=backend), parameter(6, backend=backend)]
    twins = [each.detach().clone().requires_grad_() for each in weights]
    added = {"base": "sgd_amom", "momentum": 0.7, "lr": 0.02, "maximize": True, "weight_decay": 0.1, "rotate": False}
    together = FusedLayca(weights[:1], 0.1, momentum=0.9, dampening=0.2, backend=backend)
    first = FusedLayca(twins[:1], 0.1, momentum=0.9, dampening=0.2, backend=backend)
    second = FusedLayca(twins[1:], backend=backend, **added)
    early, late = random_gradients(weights[:1], 2), random_gradients(weights, 3)
    train(together, early)
    train(first, early)
    given = {"params": weights[1:], "max_lr": 3.0, **added}
    together.add_param_group(given)
    group = together.param_groups[1]
    assert "nesterov" not in group
    assert group["max_lr"] == 3.0
    train(together, late)
    train(first, [row[:1] for row in late])
    train(second, [row[1:] for row in late])
    assert same_bits(contents(together), contents(first) + contents(second))


def test_a_group_takes_the_constructors_options_and_its_own_bases_defaults(seed: int) -> None:
    optimizer = FusedLayca([parameter(3, 4)], 0.1, momentum=0.5, dampening=0.3, radius="current", backend="torch")
    optimizer.add_param_group({"params": parameter(2, 2)})
    optimizer.add_param_group({"params": iter([parameter(2, 2)]), "base": "sgd_amom"})
    same, other = optimizer.param_groups[1:]
    assert {name: same[name] for name in ("momentum", "dampening", "radius")} == {
        "momentum": 0.5,
        "dampening": 0.3,
        "radius": "current",
    }
    assert other["momentum"] == 0.9
    assert other["radius"] == "current"


def test_names_of_parameters_are_kept(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = FusedLayca(model.named_parameters(), 0.1, momentum=0.9, backend="torch")
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    assert "momentum: 0.9" in repr(optimizer)


def test_ignored_weight_decay_is_warned_of_exactly_once(seed: int) -> None:
    params = [parameter(3, 4), parameter(5)]
    optimizer = FusedLayca(zip(("matrix", "bias"), params, strict=True), 0.1, weight_decay=0.1, backend="torch")
    grads = random_gradients(params, 3)
    with pytest.warns(UserWarning, match=r"weight_decay=0\.1 is ignored for parameter 'matrix'") as caught:
        train(optimizer, grads[:1])
    assert len(caught) == 1
    # From here on a warning would be an error.
    train(optimizer, grads[1:])
    optimizer.add_param_group({"params": [("late", parameter(2, 2))]})
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


def test_the_warning_points_to_the_line_that_called_step(seed: int) -> None:
    param = parameter(3, 4)
    optimizer = FusedLayca([param], 0.1, weight_decay=0.1, backend="torch")
    param.grad = torch.randn_like(param)
    with pytest.warns(UserWarning, match="is ignored") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


def test_the_warning_points_there_through_a_schedulers_wrapper(seed: int) -> None:
    param = parameter(3, 4)
    optimizer = FusedLayca([param], 0.1, weight_decay=0.1, backend="torch")
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    param.grad = torch.randn_like(param)
    with pytest.warns(UserWarning, match="is ignored") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


def test_weight_decay_turned_on_mid_run_is_warned_of_and_changes_nothing(seed: int) -> None:
    params = [parameter(3, 4), parameter(3, 4)]
    params[1].data.copy_(params[0].data)
    optimizers = [FusedLayca([param], 0.1, momentum=0.9, backend="torch") for param in params]
    grads = random_gradients(params[:1], 3)
    for optimizer in optimizers:
        train(optimizer, grads[:1])
    optimizers[0].param_groups[0]["weight_decay"] = 0.3
    with pytest.warns(UserWarning, match=r"weight_decay=0\.3 is ignored"):
        train(optimizers[0], grads[1:])
    train(optimizers[1], grads[1:])
    assert same_bits(contents(optimizers[0]), contents(optimizers[1]))


def test_weight_decay_where_nothing_rotates_is_no_reason_to_warn(seed: int) -> None:
    params = [parameter(3, 4), parameter(5)]
    groups = [{"params": params[:1], "rotate": False}, {"params": params[1:]}]
    optimizer = FusedLayca(groups, 0.1, weight_decay=0.1, backend="torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, random_gradients(params, 2))


REGROUP = {
    "param_groups replaced by a new list": lambda opt, group: setattr(opt, "param_groups", [*opt.param_groups, group]),
    "a group appended by hand": lambda opt, group: opt.param_groups.append(group),
    "add_param_group": lambda opt, group: opt.add_param_group(group),
}


@pytest.mark.parametrize("regroup", REGROUP.values(), ids=REGROUP.keys())
def test_changed_param_groups_are_followed(regroup: Callable[[FusedLayca, dict[str, Any]], None], seed: int) -> None:
    first, second = parameter(4, 3), parameter(3, 3)
    optimizer = FusedLayca([first], 0.1, momentum=0.9, backend="torch")
    train(optimizer, random_gradients([first], 2))
    regroup(optimizer, {**optimizer.param_groups[0], "params": [second], "lr": 0.2})
    before = second.detach().double().flatten()
    train(optimizer, random_gradients([first, second], 1))
    assert angle_between(before, second.detach().double().flatten()) == pytest.approx(math.atan(0.2), rel=2e-6)


def test_a_parameter_taken_out_of_its_group_stays_as_it_is(seed: int) -> None:
    params = [parameter(4, 3), parameter(3, 3)]
    optimizer = FusedLayca(params, 0.1, momentum=0.9, backend="torch")
    train(optimizer, random_gradients(params, 2))
    removed = optimizer.param_groups[0]["params"].pop()
    before = copy_of([removed, dict(optimizer.state[removed])])
    train(optimizer, random_gradients(params[:1], 2))
    assert same_bits(copy_of([removed, dict(optimizer.state[removed])]), before)


def test_a_parameter_appended_by_hand_to_a_group_with_names_is_trained(seed: int) -> None:
    """It has no name, so it goes by its place in messages."""
    first, second = parameter(4, 3), parameter(3, 3)
    optimizer = FusedLayca([("known", first)], 0.1, momentum=0.9, backend="torch")
    optimizer.param_groups[0]["params"].append(second)
    before = second.detach().clone()
    train(optimizer, random_gradients([first, second], 1))
    assert not torch.equal(second, before)
    second.data = second.data.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="parameter 1 of group 0"):
        optimizer.step()
