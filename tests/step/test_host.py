"""The host's side of a step: it allocates nothing, and leaves other threads running; test_watch.py: what it notices."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor

from layca_fast import FusedLayca
from layca_fast.backends import load

from ..support import HANGS, native_backends, parameter, params_of, random_gradients, same_bits, train
from .host_support import BASES, Recorder, every_base, many


@every_base
def test_a_step_on_the_same_gradients_runs_nothing_but_the_kernels(options: dict[str, Any], seed: int) -> None:
    optimizer = many(options)
    with Recorder() as recorder:
        for _ in range(3):
            optimizer.step()
    assert recorder.names == []


@every_base
def test_new_gradients_cost_one_column_of_addresses(options: dict[str, Any], seed: int) -> None:
    """Which is written into the table that is there: nothing that makes a tensor with memory of its own is run."""
    optimizer = many(options)
    for param in params_of(optimizer):
        param.grad = torch.randn_like(param)
    with Recorder() as recorder:
        optimizer.step()
    assert set(recorder.names) <= {"aten::slice.Tensor", "aten::select.int", "aten::copy_", "aten::detach"}


@pytest.mark.parametrize(
    "options",
    [pytest.param(each, marks=[pytest.mark.exhaustive] * (number > 0)) for number, each in enumerate(BASES)],
    ids=str,
)
def test_memory_does_not_grow_over_1000_steps(options: dict[str, Any], seed: int) -> None:
    optimizer = many(options)
    gradients = random_gradients(params_of(optimizer), 1)[0]

    def steps(count: int) -> None:
        for _ in range(count):
            for param, grad in zip(params_of(optimizer), gradients, strict=True):
                param.grad = grad.clone()
            optimizer.step()
            optimizer.zero_grad()

    def growth(count: int) -> tuple[int, int]:
        before, objects = tracemalloc.get_traced_memory()[0], len(gc.get_objects())
        steps(count)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before, len(gc.get_objects()) - objects

    steps(10)
    gc.collect()
    tracemalloc.start()
    try:
        # One object of 56 bytes kept per step would be 56 kB, every time; what pytest and the interpreter keep
        # themselves they keep once.
        spans = (growth(1000) for _ in range(3))
        assert any(grown < 30_000 and more < 100 for grown, more in spans)
    finally:
        tracemalloc.stop()


def big_step() -> FusedLayca:
    optimizer = FusedLayca([parameter(3000, 3000)], 0.01, momentum=0.9, backend="cpu")
    train(optimizer, [[torch.randn(3000, 3000)]])
    return optimizer


def test_other_python_threads_run_during_the_kernels(seed: int) -> None:
    """With the interpreter's lock held, the other thread would stand still for the whole step."""
    optimizer = big_step()
    (backend, batch) = optimizer._plan.batches[0]
    batch.take_gradients()
    batch.refresh()
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    thread = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    # Longer than the steps, so that the other thread runs only where the lock is given away.
    sys.setswitchinterval(60)
    try:
        thread.start()
        during = 0
        for _ in range(20):
            start = time.perf_counter()
            backend.step(batch)
            end = time.perf_counter()
            during += sum(start < tick < end for tick in list(ticks))
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert during > 0


@native_backends
def test_threads_with_optimizers_of_their_own_get_the_bits_of_one(backend: str, seed: int) -> None:
    """Each larger than what one thread does alone, so that their teams run side by side."""
    starts = [torch.randn(300, 400) for _ in range(4)]
    gradients = [[[torch.randn(300, 400)] for _ in range(5)] for _ in starts]

    def run(start: Tensor, rows: list[list[Tensor]], results: dict[int, Tensor], index: int) -> None:
        optimizer = FusedLayca([start.clone().requires_grad_()], 0.03, base="adam", backend=backend)
        train(optimizer, rows)
        results[index] = params_of(optimizer)[0].detach()

    alone: dict[int, Tensor] = {}
    together: dict[int, Tensor] = {}
    for index, (start, rows) in enumerate(zip(starts, gradients, strict=True)):
        run(start, rows, alone, index)
    threads = [
        threading.Thread(target=run, args=(start, rows, together, index))
        for index, (start, rows) in enumerate(zip(starts, gradients, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_bits(alone, dict(sorted(together.items())))


def _step_in_a_child(results: Any) -> None:
    # Of torch's and OpenMP's threads only the one that forked is left here.
    torch.set_num_threads(1)
    torch.manual_seed(5)
    param = torch.randn(400, 300).requires_grad_()
    optimizer = FusedLayca([param], 0.03, momentum=0.9, backend="cpu")
    train(optimizer, [[torch.randn(400, 300)] for _ in range(3)])
    results.put(float(param.detach().double().sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_worker_may_step(seed: int) -> None:
    """As in a DataLoader's workers, after the parent has run its own team of threads."""
    train(big_step(), [[torch.randn(3000, 3000)]])
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=_step_in_a_child, args=(results,))
    worker.start()
    from_child = results.get(timeout=HANGS)
    worker.join(timeout=HANGS)
    assert worker.exitcode == 0
    here = multiprocessing.get_context("spawn").Queue()
    threads = torch.get_num_threads()
    try:
        _step_in_a_child(here)
    finally:
        torch.set_num_threads(threads)
    assert from_child == here.get(timeout=HANGS)


PROGRAM = """
import torch
from layca_fast import FusedLayca
torch.manual_seed(3)
param = torch.randn(700, 500).requires_grad_()
optimizer = FusedLayca([param], 0.03, base="adam", backend="cpu")
for _ in range(3):
    param.grad = torch.randn_like(param)
    optimizer.step()
threads, total = torch.get_num_threads(), param.detach().double().sum().item().hex()
"""


def test_one_openmp_thread_gives_the_bits_of_several(seed: int) -> None:
    """In a process that never had more, and in this one, of which the team has run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM + "print(threads, total)"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=HANGS)
    here: dict[str, Any] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        exec(PROGRAM, here)
    finally:
        torch.set_num_threads(before)
    assert run.stdout.split() == ["1", here["total"]]
    assert here["threads"] == 2


def test_the_kernels_follow_torchs_number_of_threads(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = big_step()
    asked: list[int] = []
    backend = load("cpu")
    view = backend._view(optimizer._plan.batches[0][1])

    class Spy:
        def reserve(self, threads: int) -> None:
            view.reserve(threads)

        def step(self, threads: int) -> None:
            asked.append(threads)
            view.step(threads)

    monkeypatch.setattr(backend, "_view", lambda batch: Spy())
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 2, 3]
