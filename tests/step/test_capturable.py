"""capturable=True without a GPU: what a CUDA graph would repeat is run again here, on CPU tensors, by itself.

The same code path as on a GPU: rates, hyperparameters and step counts are read from the device's tables alone. What
only a GPU can show is in tests/gpu/test_graphs.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from layca_fast import FusedLayca
from layca_fast.step.upload import Mirror
from layca_fast.step.watch import column

from ..support import (
    clones,
    contents,
    copy_of,
    device_of,
    every_backend,
    parameter,
    params_of,
    random_gradients,
    same_bits,
    shapes_for,
    train,
)
from .capture_support import compare_replays, record

OPTIONS = (
    {"base": "sgd", "momentum": 0.9, "nesterov": True},
    {"base": "sgd", "momentum": 0.7, "dampening": 0.2, "maximize": True},
    {"base": "adam", "betas": (0.7, 0.9)},
    {"base": "rmsprop", "momentum": 0.5},
    {"base": "lion"},
    {"base": "muon", "momentum": 0.9},
)


def pair(backend: str, options: dict[str, Any], lr: Any = 0.1) -> tuple[FusedLayca, FusedLayca]:
    """A capturable optimizer past its first step, and one that is not, with equal weights and gradients' memory."""
    params = [parameter(*shape, backend=backend) for shape in shapes_for(options, ((5, 4), (6,), (2, 3, 2)))]
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
    rows = random_gradients(params_of(eager), 5 if backend == "triton" else 100)
    for _ in compare_replays(captured, eager, rows, capturing):
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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@every_backend
def test_capturable_changes_no_bit_of_an_eager_run(backend: str, options: dict[str, Any], seed: int) -> None:
    params = [parameter(*shape, backend=backend) for shape in shapes_for(options, ((5, 4), (6,)))]
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


def test_a_graph_keeps_the_table_of_addresses_that_it_recorded(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whatever eager steps upload and other graphs record in between; pageable memory stands in for pinned."""
    monkeypatch.setattr(Mirror, "_pinned_buffer", lambda mirror: torch.zeros_like(mirror._host))
    mirror = Mirror(3, 2, torch.int64, torch.device("cpu"))
    monkeypatch.setattr(mirror, "_on_host", False)
    mirror.keep_spares()
    mirror.device_tensor = torch.zeros(3, 2, dtype=torch.int64)
    columns = [torch.randint(1, 2**40, (3,)).tolist() for _ in range(4)]

    def uploaded(numbers: list[int], *, recording: bool) -> list[int]:
        mirror.set_column(1, column(numbers))
        mirror.record() if recording else mirror.push()
        return mirror.device_tensor[:, 1].tolist()

    assert uploaded(columns[0], recording=False) == columns[0]
    for numbers in columns[1:3]:
        uploaded(numbers, recording=True)
    assert uploaded(columns[3], recording=False) == columns[3]
    for buffer, numbers in zip(mirror._graphs, columns[1:3], strict=True):
        # What the replay of that graph does.
        mirror.device_tensor.copy_(buffer)
        assert mirror.device_tensor[:, 1].tolist() == numbers
        assert uploaded(columns[3], recording=False) == columns[3], "an eager step after a replay needs its own again"
