"""Copies, launches and events on streams, in the order that the host gives them to a GPU which is late.

The kernels are the emulator's, the GPU is fake_gpu.py's. What only a real one can show is listed in docs/backends.md.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from layca_fast import FusedLayca
from layca_fast.step.upload import MOST, SPARES, Buffers, Mirror

from ...support import clones, contents, params_of, random_gradients, same_bits, shapes_for, train
from .fake_gpu import FakeGpu
from .support import emulated, emulator  # noqa: F401

#: The emulator takes a minute to build.
pytestmark = pytest.mark.exhaustive

OPTIONS = (
    {"momentum": 0.9},
    {"base": "adam", "amsgrad": True},
    {"base": "rmsprop", "centered": True, "momentum": 0.5},
    {"base": "muon"},
)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
#: A GPU that does nothing before the host waits, one that lags, and one that keeps up.
every_gpu = pytest.mark.parametrize("eagerness", [0.0, 0.4, 0.9])
SHAPES = ((9, 8), (30,), (4, 3, 3), (70, 60))


@pytest.fixture
def fake(emulator: Any, seed: int) -> Callable[[float], FakeGpu]:  # noqa: F811
    return lambda eagerness: FakeGpu(emulator, seed, eagerness)


def pair(options: dict[str, Any], **more: Any) -> tuple[FusedLayca, FusedLayca]:
    """Two optimizers of equal weights: one to run on the fake GPU, one on the emulator at once."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes_for(options, SHAPES)]
    made = []
    for each in (params, clones(params)):
        groups = [{"params": each[:2]}, {"params": each[2:], "lr": 0.02}]
        made.append(FusedLayca(groups, 0.1, backend="cuda", **options, **more))
    return made[0], made[1]


def tables_of(optimizer: FusedLayca) -> Callable[[], Callable[[], None]]:
    """A check of launches: when the kernel runs, it finds the addresses and scalars that the host had at its launch."""

    def launched() -> Callable[[], None]:
        batches = [batch for _, batch in optimizer._plan.batches]
        mirrors = [mirror for batch in batches for mirror in (batch._tensor_mirror, batch.hyperparameters._mirror)]
        expected = [mirror._host.numpy().copy() for mirror in mirrors]

        def runs() -> None:
            found = [mirror.device_tensor.numpy() for mirror in mirrors]
            same = all(bool((ours == theirs).all()) for ours, theirs in zip(found, expected, strict=True))
            assert same, "a kernel runs on other tables than it was launched for"

        return runs

    return launched


def give(optimizer: FusedLayca, row: list[Tensor]) -> None:
    """These very gradients."""
    for param, grad in zip(params_of(optimizer), row, strict=True):
        param.grad = grad


def scheduled(optimizer: FusedLayca, rows: list[list[Tensor]]) -> None:
    """A step on every row, with other rates each."""
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.97)
    for row in rows:
        train(optimizer, [row])
        schedule.step()


@contextmanager
def running(gpu: FakeGpu, optimizer: FusedLayca, rows: list[list[Tensor]]) -> Iterator[None]:
    """The fake GPU, with ``optimizer`` past its first step, and a check of the tables that kernels find."""
    with gpu:
        with gpu.keeping_up():
            train(optimizer, rows[:1])
        gpu.check = tables_of(optimizer)
        gpu.log.clear()
        gpu.waited = 0
        yield
        gpu.synchronize()


@every_gpu
@every_option
def test_a_gpu_that_is_late_makes_the_bits_of_one_that_is_not(
    fake: Callable[[float], FakeGpu], options: dict[str, Any], eagerness: float, seed: int
) -> None:
    """More steps than there are pinned buffers, each with gradients elsewhere and other rates."""
    late, prompt = pair(options)
    rows = random_gradients(params_of(late), MOST + 5)
    with running(fake(eagerness), late, rows):
        scheduled(late, rows[1:])
    train(prompt, rows[:1])
    scheduled(prompt, rows[1:])
    assert same_bits(contents(late), contents(prompt))


def test_the_host_waits_for_a_buffer_only_when_all_are_under_way(fake: Callable[[float], FakeGpu], seed: int) -> None:
    late, _ = pair({"momentum": 0.9})
    rows = random_gradients(params_of(late), MOST + 5)
    gpu = fake(0.0)
    with running(gpu, late, rows):
        scheduled(late, rows[1 : MOST + 1])
        assert gpu.waited == 0
        scheduled(late, rows[MOST + 1 :])
        # Two tables, of which the first to wait lets the other's copies of the step pass, too.
        assert 1 <= gpu.waited <= 2 * 4


KERNELS = ["measure", "finish", "rotate"]


@every_option
def test_a_step_queues_uploads_each_with_its_event_and_then_its_kernels(
    fake: Callable[[float], FakeGpu], options: dict[str, Any], seed: int
) -> None:
    late, _ = pair(options)
    rows = random_gradients(params_of(late), 3)
    gpu = fake(0.5)
    counts = options.get("base") in ("adam", "rmsprop")
    with running(gpu, late, rows):
        give(late, rows[1])
        late.step()
        if options.get("base") != "muon":
            # Of the addresses of the gradients; the rates are the last step's.
            assert gpu.log == ["upload", "event", *(["prepare"] if counts else []), *KERNELS]
        for group in late.param_groups:
            group["lr"] /= 2
        gpu.log.clear()
        give(late, rows[2])
        late.step()
    uploads = [place for place, name in enumerate(gpu.log) if name == "upload"]
    assert all(gpu.log[place + 1] == "event" for place in uploads)
    launches = [place for place, name in enumerate(gpu.log) if name in (*KERNELS, "prepare")]
    # Muon's kernels advance the momentum, before its directions are made, and turn by them after that.
    assert len(launches) == (3 + counts) * (1 + (options.get("base") == "muon"))
    assert len(uploads) == 2
    assert max(uploads) < min(launches)


def test_steps_on_a_side_stream_follow_those_that_it_waited_for(fake: Callable[[float], FakeGpu], seed: int) -> None:
    """As a warm-up before a capture has them. The pinned buffers are the same, whichever stream copies from them."""
    late, prompt = pair({"base": "adam"})
    rows = random_gradients(params_of(late), 3 * MOST)
    gpu = fake(0.3)
    with running(gpu, late, rows):
        side = gpu.new_stream()
        for number, row in enumerate(rows[1:]):
            first, second = gpu.streams if number % 2 else gpu.streams[::-1]
            gpu.wait_stream(first, second)
            with gpu.on(first):
                train(late, [row])
        assert side.last is not None
    train(prompt, rows)
    assert same_bits(contents(late), contents(prompt))


@pytest.mark.parametrize("refused", ["prepare", *KERNELS])
def test_a_launch_that_is_refused_is_named_and_the_next_step_is_taken(
    fake: Callable[[float], FakeGpu], refused: str, seed: int
) -> None:
    late, _ = pair({"base": "adam"})
    rows = random_gradients(params_of(late), 3)
    gpu = fake(1.0)
    with gpu:
        train(late, rows[:1])
        gpu.refused = {refused}
        with pytest.raises(RuntimeError, match=rf"the CUDA kernel {refused} \(adam, float32\) could not be launched"):
            train(late, rows[1:2])
        gpu.refused = set()
        gpu.log.clear()
        train(late, rows[2:])
    assert [name for name in gpu.log if name in (*KERNELS, "prepare")] == ["prepare", *KERNELS]


@every_gpu
@every_option
def test_replays_of_a_graph_make_the_bits_of_steps(
    fake: Callable[[float], FakeGpu], options: dict[str, Any], eagerness: float, seed: int
) -> None:
    """Nothing runs while it is captured, and replays take what is in the rates and gradients when they run."""
    rate = torch.tensor(0.1, dtype=torch.float64)
    late, prompt = pair(options, capturable=True)
    rows = random_gradients(params_of(late), 12)
    gpu = fake(eagerness)
    gpu.is_rate(rate)
    with gpu:
        for group in late.param_groups:
            group["lr"] = rate
        for param, grad in zip(params_of(late), rows[0], strict=True):
            param.grad = grad.clone()
        with gpu.keeping_up():
            late.step()
        before = contents(late)
        with gpu.capture() as graph:
            late.step()
        gpu.synchronize()
        assert same_bits(contents(late), before)
        for number, row in enumerate(rows[1:]):
            for param, grad in zip(params_of(late), row, strict=True):
                assert param.grad is not None
                param.grad.copy_(grad)
            rate.fill_(0.1 / (number + 2))
            graph.replay()
        gpu.synchronize()
    for number, row in enumerate(rows):
        for group in prompt.param_groups:
            group["lr"] = torch.tensor(0.1 / (number + 1), dtype=torch.float64)
        train(prompt, [row])
    assert same_bits([each.detach() for each in params_of(late)], [each.detach() for each in params_of(prompt)])


def test_graphs_keep_their_addresses_whatever_steps_and_captures_come_between(
    fake: Callable[[float], FakeGpu], seed: int
) -> None:
    """Two captures with gradients of their own, eager steps between replays, more than one buffer being read."""
    late, prompt = pair({"base": "adam"}, capturable=True)
    rows = random_gradients(params_of(late), 8)
    order = [0, 1, 2, 3, 1, 4, 2, 5, 1, 2]
    gpu = fake(0.2)
    with gpu:
        with gpu.keeping_up():
            train(late, rows[:1])
        graphs = {}
        for number in (1, 2):
            give(late, rows[number])
            with gpu.capture() as graphs[number]:
                late.step()
        for number in order[1:]:
            graphs[number].replay() if number in graphs else train(late, [rows[number]])
        gpu.synchronize()
    train(prompt, [rows[number] for number in order])
    assert same_bits([each.detach() for each in params_of(late)], [each.detach() for each in params_of(prompt)])


def test_captures_neither_wait_nor_ask_nor_allocate(fake: Callable[[float], FakeGpu], seed: int) -> None:
    """All of which CUDA forbids there; as many captures as buffers are ready for."""
    late, _ = pair({"base": "adam"}, capturable=True)
    gpu = fake(0.0)
    with gpu:
        with gpu.keeping_up():
            train(late, random_gradients(params_of(late), 1))
        for param in params_of(late):
            param.grad = torch.ones_like(param)
        for _ in range(SPARES):
            with gpu.capture() as graph:
                late.step()
            assert [work.name for work in graph.work].count("upload") == 1
        with pytest.raises(RuntimeError, match="no memory is ready"), gpu.capture():
            late.step()
        with pytest.raises(RuntimeError, match="operation not permitted"), gpu.capture():
            torch.cuda.Event().query()


# What the fake GPU is there to notice.


def steps_on(gpu: FakeGpu, optimizer: FusedLayca, fault: Callable[[], None]) -> None:
    rows = random_gradients(params_of(optimizer), MOST)
    with running(gpu, optimizer, rows):
        fault()
        scheduled(optimizer, rows[1:])


def test_a_buffer_taken_too_early_is_noticed(
    fake: Callable[[float], FakeGpu], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    def careless(buffers: Buffers) -> Any:
        buffers._all.append(buffers._all.pop(0))
        return buffers._all[-1]

    late, _ = pair({"momentum": 0.9})
    with pytest.raises(AssertionError, match="a pinned buffer that a copy has yet to read"):
        steps_on(fake(0.0), late, lambda: monkeypatch.setattr(Buffers, "take", careless))


def test_a_kernel_before_its_upload_is_noticed(
    fake: Callable[[float], FakeGpu], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    late, _ = pair({"momentum": 0.9})
    with pytest.raises(AssertionError, match="other tables"):
        # Nothing runs before the host waits: what a launch itself ran into would be told as a launch that failed.
        steps_on(fake(0.0), late, lambda: monkeypatch.setattr(Mirror, "push", lambda mirror: None))


def test_an_upload_on_another_stream_than_the_kernels_is_noticed(
    fake: Callable[[float], FakeGpu], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    late, _ = pair({"momentum": 0.9})
    gpu, push = fake(0.0), Mirror.push

    def elsewhere(mirror: Mirror) -> None:
        with gpu.on(gpu.streams[1]):
            push(mirror)

    gpu.new_stream()
    with pytest.raises(AssertionError, match="other tables"):
        steps_on(gpu, late, lambda: monkeypatch.setattr(Mirror, "push", elsewhere))
