"""Captures, and changes after them, that no replay could follow: refused before anything moves."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from layca_fast import FusedLayca, attach
from layca_fast.backends import choose
from layca_fast.formulas.tables import Hyper
from layca_fast.step.plan import Plan

from ..support import (
    clones,
    contents,
    copy_of,
    native_backends,
    parameter,
    params_of,
    random_gradients,
    running,
    same_bits,
    train,
)
from .capture_support import record


@dataclass(frozen=True)
class BadCapture:
    """What is done to an optimizer past its first step, before a capture, and what the capture says to it."""

    name: str
    change: Callable[[FusedLayca], Any]
    message: str


def lose_a_gradient(optimizer: FusedLayca) -> None:
    params_of(optimizer)[1].grad = None


def add_a_parameter(optimizer: FusedLayca) -> None:
    param = parameter(3, 2)
    param.grad = torch.randn_like(param)
    optimizer.add_param_group({"params": [("late", param)]})


BAD_CAPTURES = (
    BadCapture(
        "a gradient is missing", lose_a_gradient, r"parameter 'bias' .* has no gradient.*requires_grad_\(False\)"
    ),
    BadCapture(
        "not capturable",
        lambda optimizer: optimizer.param_groups[0].update(capturable=False),
        r"capturable=False for parameter 'matrix'.*capturable=True",
    ),
    BadCapture("state to be made", add_a_parameter, "take a step before the capture"),
    BadCapture(
        "memory moved",
        lambda optimizer: setattr(params_of(optimizer)[0], "data", params_of(optimizer)[0].data.clone()),
        "take a step before the capture",
    ),
    BadCapture(
        "a float reassigned",
        lambda optimizer: optimizer.param_groups[0].update(momentum=0.5),
        r"before the capture.*optimizer\.sync_hyperparameters\(\)",
    ),
)


@pytest.mark.parametrize("case", BAD_CAPTURES, ids=lambda case: case.name)
@native_backends
def test_what_no_replay_could_repeat_is_refused_before_anything_moves(
    backend: str, case: BadCapture, capturing: Callable[[bool], None], seed: int
) -> None:
    optimizer = running(backend, capturable=True)
    for param, grad in zip(params_of(optimizer), random_gradients(params_of(optimizer), 1)[0], strict=True):
        param.grad = grad
    case.change(optimizer)
    before = contents(optimizer)
    capturing(True)
    with pytest.raises(RuntimeError, match=case.message):
        optimizer.step()
    assert same_bits(contents(optimizer), before)


def test_a_capture_is_no_place_for_a_first_step(capturing: Callable[[bool], None], seed: int) -> None:
    param = parameter(3, 4)
    param.grad = torch.randn_like(param)
    before = param.detach().clone()
    capturing(True)
    optimizer = FusedLayca([param], 0.1, momentum=0.9, backend="torch", capturable=True)
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        optimizer.step()
    assert torch.equal(param, before)
    assert not optimizer.state


def test_parameters_off_the_gpu_are_no_part_of_a_graph(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    optimizer = running(capturable=True)
    monkeypatch.setattr("layca_fast.step.plan.is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"parameter 'matrix' .* is on cpu: a CUDA graph repeats only"):
        optimizer.step()


def test_a_frozen_parameter_needs_no_gradient(capturing: Callable[[bool], None], seed: int) -> None:
    optimizer = running(capturable=True)
    lose_a_gradient(optimizer)
    matrix, bias = params_of(optimizer)
    bias.requires_grad_(False)
    before = copy_of([matrix, bias])
    record(optimizer, capturing)()
    assert torch.equal(bias, before[1])
    assert not torch.equal(matrix, before[0])


def test_attached_optimizers_are_not_capturable(capturing: Callable[[bool], None], seed: int) -> None:
    param = parameter(3, 4)
    optimizer = torch.optim.SGD([param], 0.1)
    attach(optimizer, backend="torch")
    train(optimizer, random_gradients([param], 1))
    capturing(True)
    with pytest.raises(RuntimeError, match="capturable=False for parameter 0 of group 0"):
        optimizer.step()


BAD_SYNCS = (
    pytest.param(lambda group: group.update(lr=torch.tensor(0.5)), RuntimeError, "fill that one in place", id="lr"),
    pytest.param(lambda group: group.update(momentum=0.0), RuntimeError, "runs the same kernels", id="no momentum"),
    pytest.param(lambda group: group.update(rotate=False), RuntimeError, "runs the same kernels", id="rotate"),
    pytest.param(lambda group: group.update(momentum=-1.0), ValueError, r"momentum=-1\.0", id="out of range"),
)


@pytest.mark.parametrize(("change", "error", "message"), BAD_SYNCS)
def test_changes_that_a_graph_cannot_follow_are_refused(
    change: Callable[[Any], None],
    error: type[Exception],
    message: str,
    capturing: Callable[[bool], None],
    seed: int,
) -> None:
    optimizer = running(lr=torch.tensor(0.1), capturable=True)
    record(optimizer, capturing)
    optimizer.sync_hyperparameters()
    tables = [batch.hypers.clone() for _, batch in optimizer._plan.batches]
    change(optimizer.param_groups[0])
    with pytest.raises(error, match=message):
        optimizer.sync_hyperparameters()
    assert same_bits([batch.hypers for _, batch in optimizer._plan.batches], tables)


def test_a_rate_that_becomes_a_tensor_is_refused(capturing: Callable[[bool], None], seed: int) -> None:
    """The graph has it from the host, and looks at no tensor."""
    optimizer = running(lr=0.1, capturable=True)
    record(optimizer, capturing)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.3)
    with pytest.raises(RuntimeError, match="capture the step again"):
        optimizer.sync_hyperparameters()


def test_another_capture_takes_the_rate_from_another_tensor(capturing: Callable[[bool], None], seed: int) -> None:
    optimizer = running(lr=torch.tensor(0.1), capturable=True)
    record(optimizer, capturing)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.3)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    record(optimizer, capturing)
    optimizer.sync_hyperparameters()


def test_graphs_follow_what_is_reassigned_after_a_new_plan(capturing: Callable[[bool], None], seed: int) -> None:
    optimizer = running(lr=0.1, capturable=True)
    record(optimizer, capturing)
    ((_, recorded),) = optimizer._plan.batches
    optimizer._plan = Plan(optimizer.param_groups, optimizer.state, choose, previous=optimizer._plan)
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.sync_hyperparameters()
    assert (recorded.hypers[:, Hyper.LR] == 0.7).all()


def test_loading_after_a_capture_asks_for_another_one(capturing: Callable[[bool], None], seed: int) -> None:
    """The graph goes on with the state that it has recorded, which stays in memory for it."""
    optimizer = running(capturable=True)
    record(optimizer, capturing)
    plan = weakref.ref(optimizer._plan)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="capture the step again"):
        optimizer.sync_hyperparameters()
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, random_gradients(params_of(optimizer), 1))
    gc.collect()
    assert plan() is not None
    optimizer.sync_hyperparameters()


def test_sync_hyperparameters_outside_of_graphs_changes_nothing(capturing: Callable[[bool], None], seed: int) -> None:
    """Before the first step, between steps, and with changes that the next step makes a new plan for."""
    params = [parameter(4, 3), parameter(5)]
    optimizers = [FusedLayca(each, 0.1, momentum=0.9, backend="torch") for each in (params, clones(params))]
    rows = random_gradients(params, 4)
    for row, change in zip(rows, ({}, {"momentum": 0.3}, {"lr": 0.2}, {"momentum": 0.0}), strict=True):
        for optimizer in optimizers:
            optimizer.param_groups[0].update(change)
        optimizers[0].sync_hyperparameters()
        for optimizer in optimizers:
            train(optimizer, [row])
        assert same_bits(contents(optimizers[0]), contents(optimizers[1]))
    capturing(True)
    with pytest.raises(RuntimeError, match="outside of the capture"):
        optimizers[0].sync_hyperparameters()
