"""Signals that come during a step wait for its end, and leave no half of one."""

import copy
import gc
import signal
import sys
import threading
import time
from typing import Any

import pytest
import torch

from layca_fast import FusedLayca
from layca_fast.step.interrupts import uninterrupted

from ..support import contents, native_backends, parameter, params_of, random_gradients, same_bits, train
from .interrupted_support import many_batches, twin


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
        hit = interrupted_step(optimizer, max(part * length, 1e-6))
        # However fast the machine is, and whatever else it does: about every second signal finds a step.
        length *= 1.2 if hit else 0.8
        interrupted += hit
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


def test_a_signal_right_after_the_kernels_leaves_nothing_unsettled(seed: int) -> None:
    """Before Python has asked how many batches have moved, as the kernels return."""
    params = [parameter(6, 5, backend="cpu"), parameter(6, 5, backend="cpu", dtype=torch.float64)]
    optimizer = FusedLayca(params, 0.1, backend="cpu")
    train(optimizer, random_gradients(params, 2))
    before = [param._version for param in params]
    raised = False

    def interrupt(frame: Any, event: str, called: Any) -> None:
        nonlocal raised
        if event == "c_call" and called is len and frame.f_code.co_name == "_take_and_settle" and not raised:
            raised = True
            raise KeyboardInterrupt

    for param in params:
        param.grad = torch.randn_like(param)
    sys.setprofile(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    finally:
        sys.setprofile(None)
    assert raised
    assert all(param._version > old for param, old in zip(params, before, strict=True))
