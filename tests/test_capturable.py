"""capturable=True without a GPU: what a CUDA graph would repeat is run again here, on CPU tensors, by itself.

The same code path as on a GPU: rates, hyperparameters and step counts are read from the device's tables alone. What
only a GPU can show is in test_cuda_graphs.py.
"""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from layca_fast import FusedLayca, attach, capture
from layca_fast.batch import Batch
from layca_fast.unscaling import LossScale
from layca_fast.upload import Mirror

from .support import (
    clones,
    contents,
    copy_of,
    device_of,
    every_backend,
    native_backends,
    parameter,
    params_of,
    random_gradients,
    running,
    same_bits,
    train,
)

OPTIONS = (
    {"base": "sgd", "momentum": 0.9, "nesterov": True},
    {"base": "sgd", "momentum": 0.7, "dampening": 0.2, "maximize": True},
    {"base": "adam", "betas": (0.7, 0.9)},
    {"base": "rmsprop", "momentum": 0.5},
    {"base": "lion"},
)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether a capture is to be seen under way; CPU tensors then pass for recorded ones."""
    monkeypatch.setattr(capture, "RECORDED_DEVICES", ("cuda", "cpu"))

    def say(whether: bool) -> None:
        for module in ("plan", "optimizer"):
            monkeypatch.setattr(f"layca_fast.{module}.is_capturing", lambda: whether)

    return say


def record(optimizer: FusedLayca, capturing: Callable[[bool], None]) -> Callable[[], None]:
    """Take a step as a capture would see it; what is returned does to the device what a replay would."""
    tables: list[Tensor] = []
    scales: list[LossScale | None] = []
    fetch = Batch.fetch

    def fetching(batch: Batch, loss_scale: LossScale | None) -> None:
        scales.append(loss_scale)
        fetch(batch, loss_scale)

    with pytest.MonkeyPatch.context() as patch:
        # A graph keeps the gradients' memory, and a copy of the table with their addresses.
        patch.setattr(Batch, "release", lambda batch: None)
        patch.setattr(Mirror, "record", lambda mirror: tables.append(mirror.device_tensor.clone()))
        patch.setattr(Batch, "fetch", fetching)
        capturing(True)
        optimizer.step()
        capturing(False)
    recorded = list(zip(optimizer._plan.batches, tables, scales, strict=True))

    @torch.no_grad()
    def replay() -> None:
        for (backend, batch), table, loss_scale in recorded:
            batch.tensors.copy_(table)
            batch.fetch(loss_scale)
            backend.step(batch)

    return replay


def pair(backend: str, options: dict[str, Any], lr: Any = 0.1) -> tuple[FusedLayca, FusedLayca]:
    """A capturable optimizer past its first step, and one that is not, with equal weights and gradients' memory."""
    params = [parameter(*shape, backend=backend) for shape in ((5, 4), (6,), (2, 3, 2))]
    ours, plain = clones(params), clones(params)
    fast = torch.tensor(lr, dtype=torch.float64, device=device_of(backend))
    groups = [{"params": ours[:2], "lr": fast}, {"params": ours[2:], "lr": fast / 2, "chunks": 2}]
    captured = FusedLayca(groups, backend=backend, capturable=True, **options)
    groups = [{"params": plain[:2], "lr": lr}, {"params": plain[2:], "lr": lr / 2, "chunks": 2}]
    eager = FusedLayca(groups, backend=backend, **options)
    (row,) = random_gradients(params, 1)
    for optimizer in (captured, eager):
        train(optimizer, [row])
    return captured, eager


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@every_backend
def test_replayed_steps_follow_a_schedule_as_eager_ones_do(
    backend: str, options: dict[str, Any], capturing: Callable[[bool], None], seed: int
) -> None:
    """The rates are filled in place, the gradients too, and the host is not asked again."""
    captured, eager = pair(backend, options)
    schedules = [lr_scheduler.CosineAnnealingLR(each, T_max=7, eta_min=1e-3) for each in (captured, eager)]
    replay, steps = None, 10 if backend == "triton" else 100
    for row in random_gradients(params_of(eager), steps):
        for param, grad in zip(params_of(captured), row, strict=True):
            param.grad.copy_(grad)
        if replay is None:
            replay = record(captured, capturing)
        else:
            replay()
        train(eager, [row])
        assert same_bits(contents(captured), contents(eager))
        for schedule in schedules:
            schedule.step()
    rates = [[float(group["lr"]) for group in each.param_groups] for each in (captured, eager)]
    assert rates[0] == rates[1] != [0.1, 0.05]


@every_backend
def test_what_a_scheduler_reassigns_acts_after_sync_hyperparameters(
    backend: str, capturing: Callable[[bool], None], seed: int
) -> None:
    """Momentum as OneCycleLR cycles it, a lr that is a float, weight decay: all at once, and not a step earlier."""
    params = [parameter(*shape, backend=backend) for shape in ((5, 4), (6,))]
    optimizers = [
        FusedLayca(each, 0.1, momentum=0.9, weight_decay=0.01, rotate=False, backend=backend, capturable=True)
        for each in (params, clones(params))
    ]
    captured, eager = optimizers
    rows = random_gradients(params, 4)
    for optimizer in optimizers:
        train(optimizer, rows[:1])
    replay = record(captured, capturing)
    train(eager, rows[:1])
    for row, change in zip(
        rows[1:], ({"momentum": 0.5}, {"lr": 0.3, "weight_decay": 0.2}, {"maximize": True}), strict=True
    ):
        for param, grad in zip(params, row, strict=True):
            param.grad.copy_(grad)
        captured.param_groups[0].update(change)
        replay()
        train(eager, [row])
        assert same_bits(contents(captured), contents(eager)), "the host's change acted before it was handed over"
        captured.sync_hyperparameters()
        eager.param_groups[0].update(change)
        replay()
        train(eager, [row])
        assert same_bits(contents(captured), contents(eager))


@every_backend
def test_a_rate_in_a_new_tensor_before_the_capture_is_the_one_that_replays_read(
    backend: str, capturing: Callable[[bool], None], seed: int
) -> None:
    captured, eager = pair(backend, {"momentum": 0.9})
    (row,) = random_gradients(params_of(eager), 1)
    for group in captured.param_groups:
        group["lr"] = group["lr"].clone()
    for param, grad in zip(params_of(captured), row, strict=True):
        param.grad.copy_(grad)
    replay = record(captured, capturing)
    train(eager, [row])
    for group, plain in zip(captured.param_groups, eager.param_groups, strict=True):
        group["lr"].fill_(0.25)
        plain["lr"] = 0.25
    replay()
    train(eager, [row])
    assert same_bits(contents(captured), contents(eager))


@every_backend
def test_the_loss_scale_is_read_anew_by_every_replay(
    backend: str, capturing: Callable[[bool], None], seed: int
) -> None:
    """With unscale_in_step the scale and found_inf are tensors that a graph computes: here they are filled in place."""
    params = [parameter(*shape, backend=backend) for shape in ((5, 4), (6,))]
    captured = FusedLayca(params, 0.1, base="adam", backend=backend, capturable=True, unscale_in_step=True)
    eager = FusedLayca(clones(params), 0.1, base="adam", backend=backend)
    device = params[0].device
    captured.grad_scale, captured.found_inf = torch.tensor(8.0, device=device), torch.tensor(0.0, device=device)
    rows = random_gradients(params, 6)
    train(captured, [[8.0 * grad for grad in rows[0]]])
    train(eager, rows[:1])
    replay = record(captured, capturing)
    train(eager, rows[:1])
    for step, row in enumerate(rows[1:]):
        captured.grad_scale.fill_(2.0**step)
        captured.found_inf.fill_(step % 2)
        for param, grad in zip(params, row, strict=True):
            param.grad.copy_(2.0**step * grad)
        replay()
        if step % 2 == 0:
            train(eager, [row])
        assert same_bits(copy_of(params), copy_of(params_of(eager)))
    states = [[dict(each.state[param]) for param in params_of(each)] for each in (captured, eager)]
    assert same_bits(*states)


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
    monkeypatch.setattr("layca_fast.plan.is_capturing", lambda: True)
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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@every_backend
def test_capturable_changes_no_bit_of_an_eager_run(backend: str, options: dict[str, Any], seed: int) -> None:
    params = [parameter(*shape, backend=backend) for shape in ((5, 4), (6,))]
    optimizers = [
        FusedLayca(each, 0.1, backend=backend, capturable=capturable, **options)
        for each, capturable in ((params, True), (clones(params), False))
    ]
    rows = random_gradients(params, 4)
    for optimizer in optimizers:
        train(optimizer, rows)
    assert same_bits(contents(optimizers[0]), contents(optimizers[1]))


def test_capturable_goes_with_the_groups(seed: int) -> None:
    """Also from a checkpoint, as in torch; of one without it, the constructor's holds."""
    first, second = parameter(3, 4), parameter(3, 4)
    optimizer = FusedLayca([{"params": [first], "capturable": True}, {"params": [second]}], backend="torch")
    assert [group["capturable"] for group in optimizer.param_groups] == [True, False]
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["capturable"]
    loaded = FusedLayca([{"params": [first]}, {"params": [second]}], backend="torch", capturable=True)
    loaded.load_state_dict(optimizer.state_dict())
    assert [group["capturable"] for group in loaded.param_groups] == [True, False]
    loaded.load_state_dict(saved)
    assert [group["capturable"] for group in loaded.param_groups] == [True, True]
