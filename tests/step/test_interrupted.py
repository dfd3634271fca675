"""A step that raises has modified nothing, or has been taken whole, or says what it has left."""

import copy
import gc
import signal
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.backends import load
from layca_fast.backends.cpu import CpuBackend
from layca_fast.formulas.orthogonal import NewtonSchulz
from layca_fast.step import plan as plans
from layca_fast.step.batch import Batch
from layca_fast.step.interrupts import uninterrupted
from layca_fast.step.learned_radius import LearnedRadii

from ..support import clones, contents, native_backends, parameter, params_of, random_gradients, same_bits, train


def many_batches(backend: str, params: list[Parameter] | None = None) -> FusedLayca:
    """Batches of several bases and types, one of them with dampening: a first gradient is not as the others."""
    if params is None:
        dtypes = (torch.float32, torch.float64, torch.float32, torch.float32)
        params = [
            parameter(*shape, dtype=dtype)
            for shape, dtype in zip(((6, 5), (4, 3), (7, 2), (3, 0)), dtypes, strict=True)
        ]
    groups = [
        {"params": params[:1], "momentum": 0.9, "dampening": 0.5},
        {"params": params[1:2], "base": "adam"},
        {"params": params[2:3], "base": "rmsprop"},
        {"params": params[3:], "base": "adam"},
    ]
    return FusedLayca(groups, 0.05, backend=backend)


def twin(optimizer: FusedLayca, backend: str) -> FusedLayca:
    return many_batches(backend, clones(params_of(optimizer)))


class Injected(MemoryError):
    """What the tests raise."""


class FailingAllocations:
    """The allocation of this number, and no other, fails: of torch's functions that make tensors on the host."""

    NAMES = ("zeros", "empty", "full_like", "empty_like", "zeros_like", "tensor", "full")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.count = 0
        self.number = number
        for name in self.NAMES:
            monkeypatch.setattr(torch, name, self._failing(getattr(torch, name)))

    def _failing(self, function: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.number:
                raise Injected
            return function(*args, **kwargs)

        return allocate


def allocations_of_a_first_step(backend: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        optimizer = many_batches(backend)
        rows = random_gradients(params_of(optimizer), 1)
        failing = FailingAllocations(patch, -1)
        train(optimizer, rows)
        return failing.count


@native_backends
def test_a_first_step_without_memory_modifies_nothing(backend: str, seed: int) -> None:
    """Whichever of its allocations fails; a retry is then the step that an optimizer takes that never failed."""
    allocations = allocations_of_a_first_step(backend)
    assert allocations > 10
    for number in range(1, allocations + 1):
        optimizer = many_batches(backend)
        other = twin(optimizer, backend)
        rows = random_gradients(params_of(optimizer), 2)
        for param, grad in zip(params_of(optimizer), rows[0], strict=True):
            param.grad = grad.clone()
        weights = [param.detach().clone() for param in params_of(optimizer)]
        with pytest.MonkeyPatch.context() as patch:
            FailingAllocations(patch, number)
            with pytest.raises((MemoryError, RuntimeError)) as caught:
                optimizer.step()
        if "failed half-way" in str(caught.value):
            # The torch backend's own temporaries: it has said so.
            assert backend == "torch"
            continue
        assert same_bits([param.detach() for param in params_of(optimizer)], weights), number
        train(optimizer, rows)
        train(other, rows)
        assert same_bits(contents(optimizer), contents(other)), number


def test_memory_is_taken_for_every_batch_before_any_moves(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    optimizer = many_batches("cpu")
    rows = random_gradients(params_of(optimizer), 1)
    reserved: list[Batch] = []
    reserve = CpuBackend.reserve

    def failing(self: CpuBackend, batch: Batch) -> None:
        reserve(self, batch)
        reserved.append(batch)
        if len(reserved) == 3:
            raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(CpuBackend, "reserve", failing)
    weights = [param.detach().clone() for param in params_of(optimizer)]
    with pytest.raises(MemoryError, match="nothing was modified"):
        train(optimizer, rows)
    assert same_bits([param.detach() for param in params_of(optimizer)], weights)
    for param in params_of(optimizer):
        assert all(not state.any() for state in optimizer.state[param].values())


@pytest.mark.parametrize("failing", range(3))
@native_backends
def test_a_failure_between_two_batches_is_told_and_settled(
    backend: str, failing: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """What was stepped before it has been stepped whole: its first gradient counts as one, autograd knows."""
    optimizer = many_batches(backend)
    rows = random_gradients(params_of(optimizer), 2)
    kind = type(load(backend))
    call, seen = kind.call, []

    def injected(self: Any, batch: Batch) -> Any:
        seen.append(batch)
        if len(seen) == failing + 1:

            def fail() -> None:
                raise OSError("no")

            return fail
        return call(self, batch)

    versions = [param._version for param in params_of(optimizer)]
    with monkeypatch.context() as patch:
        patch.setattr(kind, "call", injected)
        with pytest.raises((OSError, RuntimeError)) as caught:
            train(optimizer, rows[:1])
    if failing or backend == "torch":
        assert "the step failed half-way" in str(caught.value)
    moved = [id(param) for batch in seen[:failing] for param in batch.params]
    for param, version in zip(params_of(optimizer), versions, strict=True):
        assert (param._version > version) == ((id(param) in moved and param.numel() > 0) or id(param) in moved)
    assert all(not slot.fresh for batch in seen[:failing] for slot in batch.slots)
    assert all(slot.fresh for batch in seen[failing:] for slot in batch.slots)


def test_signals_wait_for_the_end_of_the_step_and_the_second_does_not() -> None:
    seen: list[str] = []

    def once() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            seen.append("after the first")

    def twice() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            seen.append("never")

    # Shells have what they start in the background ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for press in (once, twice):
            with pytest.raises(KeyboardInterrupt):
                press()
        assert seen == ["after the first"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


class Interrupt(Exception):
    """What the signal raises."""


def interrupted_step(optimizer: FusedLayca, seconds: float) -> bool:
    """Whether a signal that arrives after so many seconds has interrupted the step, or its end.

    One that finds torch's own no_grad at its end leaves gradients off, as after any of torch's optimizers.
    """

    def handler(number: int, frame: Any) -> None:
        raise Interrupt

    old = signal.signal(signal.SIGALRM, handler)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            optimizer.step()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupt:
        return True
    finally:
        signal.signal(signal.SIGALRM, old)
        torch.set_grad_enabled(True)
    return False


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")
@native_backends
def test_signals_at_random_times_leave_no_half_of_a_step(backend: str, seed: int) -> None:
    """In first and in later steps: all has moved or nothing has, and the run goes on as if it were undisturbed."""
    start = many_batches(backend)
    rows = random_gradients(params_of(start), 3)
    timed = copy.deepcopy(start)
    begin = time.perf_counter()
    train(timed, rows[:1])
    length = max(time.perf_counter() - begin, 1e-4)
    interrupted = 0
    times = torch.rand(60).tolist()
    for number, part in enumerate(times):
        optimizer, other = twin(start, backend), twin(start, backend)
        before = number % 2
        train(optimizer, rows[:before])
        train(other, rows[:before])
        old = [param.detach().clone() for param in params_of(optimizer)]
        for each in (optimizer, other):
            for param, grad in zip(params_of(each), rows[before], strict=True):
                param.grad = grad.clone()
        interrupted += interrupted_step(optimizer, max(part * length, 1e-6))
        other.step()
        moved = [not same_bits(param.detach(), was) for param, was in zip(params_of(optimizer), old, strict=True)][:3]
        assert len(set(moved)) == 1, f"moved: {moved}"
        if not moved[0]:
            optimizer.step()
        train(optimizer, rows[before + 1 :])
        train(other, rows[before + 1 :])
        assert same_bits(contents(optimizer), contents(other))
    assert interrupted > 5


def test_threads_other_than_the_main_one_step_as_ever(seed: int) -> None:
    """They can neither receive signals nor set their handlers."""
    optimizer = many_batches("torch")
    rows = random_gradients(params_of(optimizer), 2)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            train(optimizer, rows)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []
    gc.collect()


def test_a_plan_that_cannot_be_made_leaves_no_state(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    optimizer = many_batches("cpu")
    made: list[Tensor] = []
    batch = plans.Batch

    def failing(*args: Any) -> Batch:
        made.append(torch.zeros(()))
        if len(made) == 2:
            raise Injected
        return batch(*args)

    monkeypatch.setattr("layca_fast.step.directions.Batch", failing)
    with pytest.raises(Injected):
        train(optimizer, random_gradients(params_of(optimizer), 1))
    assert not optimizer.state


def test_every_signal_that_has_waited_is_delivered() -> None:
    """Also where what handles another raises, as that of Ctrl-C does; each in the order in which they came."""
    seen: list[int] = []

    def raising(number: int, frame: Any) -> None:
        seen.append(number)
        raise Interrupt

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def send_all() -> None:
        with uninterrupted():
            for number in numbers:
                signal.raise_signal(number)

    before = {number: signal.signal(number, raising) for number in numbers}
    try:
        with pytest.raises(Interrupt):
            send_all()
        assert seen == list(numbers)
        assert all(signal.getsignal(number) is raising for number in numbers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("where", [(NewtonSchulz, "run"), (LearnedRadii, "factors")], ids=["direct", "radii"])
@native_backends
def test_a_failure_between_the_stages_of_a_step_is_told(
    where: tuple[type, str], backend: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The momentum has moved by then, whatever the backend: a second try would advance it twice."""
    param = parameter(6, 4)
    optimizer = FusedLayca([param], 0.1, base="muon", radius="learned", backend=backend)
    train(optimizer, random_gradients([param], 1))
    before = optimizer.state[param]["momentum_buffer"].clone()

    def failing(*_: Any) -> None:
        raise MemoryError("no")

    monkeypatch.setattr(*where, failing)
    with pytest.raises(RuntimeError, match=r"the step failed half-way.*MemoryError: no"):
        train(optimizer, random_gradients([param], 1))
    assert not torch.equal(optimizer.state[param]["momentum_buffer"], before)
