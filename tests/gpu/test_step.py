"""What a step asks of GPU and host: no waiting, no allocation, few launches, the caller's stream and device."""

import threading
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from layca_fast import FusedLayca, backends
from layca_fast.backends import choose
from layca_fast.commands.cases import BASE_OPTIONS

from ..support import contents, directs, params_of, same_bits
from .support import (
    GPU,
    GPU_BACKENDS,
    ON_GPU,
    SHAPES,
    every_gpu_backend,
    give,
    kernels_and_others,
    on,
    ready,
    waiting_is_an_error,
    weights,
)

#: torch warns that its profiler may miss something.
pytestmark = [*ON_GPU, pytest.mark.filterwarnings("default")]

every_base = pytest.mark.parametrize("options", BASE_OPTIONS, ids=str)

#: Directions of whole matrices are products, and their norms: torch launches and allocates for those.
elementwise_bases = pytest.mark.parametrize("options", [each for each in BASE_OPTIONS if not directs(each)], ids=str)
directing_bases = pytest.mark.parametrize("options", [each for each in BASE_OPTIONS if directs(each)], ids=str)

#: About 50 ms of the GPU's clock.
A_WHILE = 100_000_000


def test_auto_takes_the_first_backend_that_runs() -> None:
    available = [name for name in ("cuda", "triton", "torch") if backends()[name].available]
    assert choose("auto", GPU).name == available[0]
    assert available[: len(GPU_BACKENDS)] == list(GPU_BACKENDS)


def test_waiting_is_noticed() -> None:
    number = torch.ones((), device=GPU)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        number.item()
    assert torch.cuda.get_sync_debug_mode() == 0


@every_base
@every_gpu_backend
def test_a_step_does_not_wait_for_the_gpu(backend: str, options: dict[str, Any], seed: int) -> None:
    optimizer = ready(backend, **options)
    with waiting_is_an_error():
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            optimizer.step()


@every_gpu_backend
def test_the_host_may_be_many_steps_ahead_under_a_schedule(backend: str, seed: int) -> None:
    """torch does not notice who waits for an event, so the clock does; and no step takes the rate of another."""
    ours, theirs = (ready(backend, momentum=0.9) for _ in range(2))
    copy_run(ours, theirs)
    rates = torch.linspace(0.01, 0.06, 6).tolist()
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(20 * A_WHILE)
    busy.record()
    for rate in rates:
        ours.param_groups[0]["lr"] = rate
        ours.step()
    assert not busy.query(), "the host waited for the GPU"
    for rate in rates:
        torch.cuda.synchronize()
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
    assert same_bits(contents(ours), contents(theirs))


def copy_run(source: FusedLayca, target: FusedLayca) -> None:
    """Make weights, gradients and state of ``target`` those of ``source``."""
    with torch.no_grad():
        for one, other in zip(params_of(source), params_of(target), strict=True):
            other.copy_(one)
            other.grad.copy_(one.grad)
            for name, value in source.state[one].items():
                target.state[other][name].copy_(value)


@every_gpu_backend
def test_a_rate_on_the_gpu_is_not_read_by_the_host(backend: str, seed: int) -> None:
    rate = torch.tensor(0.03, device=GPU)
    ours, theirs = (ready(backend, lr=lr, momentum=0.9) for lr in (rate, 0.03))
    copy_run(ours, theirs)
    with waiting_is_an_error():
        # A number that float32 holds exactly.
        rate.fill_(0.25)
        theirs.param_groups[0]["lr"] = 0.25
        for optimizer in (ours, theirs):
            optimizer.step()
    assert same_bits(contents(ours), contents(theirs))


@elementwise_bases
@every_gpu_backend
def test_nothing_is_allocated_after_the_first_step(backend: str, options: dict[str, Any], seed: int) -> None:
    optimizer = ready(backend, **options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(GPU)["allocation.all.allocated"]
    for _ in range(3):
        optimizer.step()
    assert torch.cuda.memory_stats(GPU)["allocation.all.allocated"] == before


@directing_bases
@every_gpu_backend
def test_directions_leave_nothing_allocated(backend: str, options: dict[str, Any], seed: int) -> None:
    """And need little for a moment: the norms of a stack, no copy of a matrix."""
    optimizer = ready(backend, ((1024, 1024),), **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    for _ in range(3):
        optimizer.step()
    assert torch.cuda.memory_allocated(GPU) == before
    assert torch.cuda.max_memory_allocated(GPU) - before < 1024 * 1024


@elementwise_bases
@every_gpu_backend
def test_the_number_of_launches_does_not_depend_on_that_of_tensors(
    backend: str, options: dict[str, Any], seed: int
) -> None:
    for shapes in (SHAPES[:3], SHAPES * 30):
        optimizer = ready(backend, shapes, **options)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            optimizer.step()
            torch.cuda.synchronize()
        kernels, others = kernels_and_others(recorded.events())
        counted = "step" in next(iter(optimizer.state.values()))
        assert kernels == sorted(["measure", "finish", "rotate", *["prepare"] * counted])
        assert others == []


@every_gpu_backend
def test_a_step_joins_the_current_stream(backend: str, seed: int) -> None:
    """Its gradients are written on that stream, late, and its weights are read there."""
    ours, theirs = (ready(backend, momentum=0.9) for _ in range(2))
    copy_run(ours, theirs)
    late = [grad.to(GPU) for grad in weights()]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(GPU)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE)
        for param, grad in zip(params_of(ours), late, strict=True):
            param.grad.copy_(grad)
        ours.step()
        seen = [param.detach() * 1 for param in params_of(ours)]
    stream.synchronize()
    for param, grad in zip(params_of(theirs), late, strict=True):
        param.grad.copy_(grad)
    theirs.step()
    assert same_bits(contents(ours), contents(theirs))
    assert same_bits(seen, [param.detach() for param in params_of(theirs)])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_gpu_backend
def test_tensors_on_a_gpu_that_is_not_the_current_one(backend: str, seed: int) -> None:
    start, grads = weights(), [weights() for _ in range(3)]
    runs = []
    for index in (0, 1):
        optimizer = FusedLayca(on(torch.device("cuda", index), start), 0.03, momentum=0.9, backend=backend)
        for row in grads:
            give(optimizer, row)
            with torch.cuda.device(1 - index):
                optimizer.step()
                assert torch.cuda.current_device() == 1 - index
        runs.append([param.detach().cpu() for param in params_of(optimizer)])
    assert same_bits(*runs)


@every_gpu_backend
def test_several_threads(backend: str, seed: int) -> None:
    """Each with an optimizer and a stream of its own."""
    starts, grads = [weights() for _ in range(4)], [[weights() for _ in range(20)] for _ in range(4)]

    def run(index: int) -> list[Any]:
        optimizer = FusedLayca(on(GPU, starts[index]), 0.03 * (index + 1), momentum=0.9, backend=backend)
        for row in grads[index]:
            give(optimizer, row)
            optimizer.step()
        return contents(optimizer)

    expected = [run(index) for index in range(4)]
    found: dict[int, list[Any]] = {}

    def work(index: int) -> None:
        stream = torch.cuda.Stream(GPU)
        with torch.cuda.stream(stream):
            found[index] = run(index)
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert same_bits([found[index] for index in range(4)], expected)
