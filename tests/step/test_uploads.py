"""Which pinned buffer an upload takes, with events that a test sets; and what the tests on a GPU go by, without one."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from layca_fast import FusedLayca
from layca_fast.step.upload import MOST, READY, SPARES, Buffers, Mirror
from layca_fast.step.watch import column

from ..gpu.support import kernels_and_others, waiting_is_an_error
from ..support import contents, params_of, random_gradients, running, same_bits, train


class FakeEvent:
    """Of a device that is done when the test, or waiting, says so."""

    def __init__(self) -> None:
        self.done, self.waited = True, 0

    def query(self) -> bool:
        return self.done

    def record(self, stream: Any = None) -> None:
        self.done = False

    def synchronize(self) -> None:
        self.waited += not self.done
        self.done = True


@pytest.fixture
def made() -> list[tuple[torch.Tensor, FakeEvent]]:
    return []


@pytest.fixture
def buffers(made: list[Any]) -> Buffers:
    def make() -> tuple[torch.Tensor, FakeEvent]:
        made.append((torch.zeros(1), FakeEvent()))
        return made[-1]

    return Buffers(make)


def use(buffers: Buffers) -> FakeEvent:
    _, event = buffers.take()
    assert event.query(), "its copy is still under way"
    event.record(None)
    return event


def test_a_device_that_keeps_up_needs_no_more_buffers(buffers: Buffers, made: list[Any]) -> None:
    for _ in range(100):
        use(buffers).done = True
    assert len(made) == READY
    assert not any(event.waited for _, event in made)


def test_a_device_that_lags_gets_more_buffers_and_nobody_waits(buffers: Buffers, made: list[Any]) -> None:
    used = [use(buffers) for _ in range(MOST)]
    assert len(made) == MOST == len(set(map(id, used)))
    assert not any(event.waited for event in used)
    used[5].done = True
    assert use(buffers) is used[5]
    assert not any(event.waited for event in used)


def test_with_every_buffer_under_way_the_oldest_is_waited_for(buffers: Buffers, made: list[Any]) -> None:
    used = [use(buffers) for _ in range(MOST)]
    used[0].done = True
    assert use(buffers) is used[0]
    # Now the latest.
    for oldest in (*used[1:], used[0]):
        assert use(buffers) is oldest
        assert oldest.waited == 1
    assert len(made) == MOST


@pytest.fixture
def pageable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of CPU tensors are uploaded as to a GPU, from pageable memory."""
    monkeypatch.setattr(Mirror, "_pinned_buffer", lambda mirror: torch.zeros_like(mirror._host))
    make = Mirror.__init__

    def elsewhere(mirror: Mirror, *args: Any) -> None:
        make(mirror, *args)
        mirror._on_host = False

    monkeypatch.setattr(Mirror, "__init__", elsewhere)


def test_a_capture_that_lacks_memory_is_refused_before_anything_is_modified(
    seed: int, pageable: None, capturing: Any
) -> None:
    optimizer = running(capturable=True, lr=torch.tensor(0.1))

    def capture() -> None:
        capturing(True)
        try:
            optimizer.step()
        finally:
            capturing(False)

    for _ in range(2):
        for _ in range(SPARES):
            capture()
        before = contents(optimizer)
        with pytest.raises(RuntimeError, match=r"no memory is ready .*sync_hyperparameters\(\) before the capture"):
            capture()
        assert same_bits(contents(optimizer), before)
        optimizer.sync_hyperparameters()


def test_a_group_may_become_capturable_mid_run(seed: int, pageable: None, capturing: Any) -> None:
    optimizer = running(lr=torch.tensor(0.1))
    optimizer.param_groups[0]["capturable"] = True
    train(optimizer, random_gradients(params_of(optimizer), 1))
    capturing(True)
    optimizer.step()
    capturing(False)
    assert [len(batch._tensor_mirror._graphs) for _, batch in optimizer._plan.batches] == [1]


def test_runs_without_captures_keep_no_spares(seed: int, pageable: None) -> None:
    optimizer: FusedLayca = running()
    assert not any(batch._tensor_mirror._spares for _, batch in optimizer._plan.batches)


def test_torchs_first_warning_does_not_leave_waiting_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with waiting_is_an_error():
        assert modes == ["error"]
    with pytest.raises(ZeroDivisionError), waiting_is_an_error():
        _ = 1 / 0
    assert modes == ["error", "default"] * 2

    def refuse(mode: str) -> None:
        modes.append(mode)
        if mode == "error":
            raise RuntimeError("refused")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", refuse)
    with pytest.raises(RuntimeError, match="refused"), waiting_is_an_error():
        pass
    assert modes[-1] == "default"


def event(name: str, device: DeviceType = DeviceType.CUDA, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)


def test_kernels_are_told_from_what_else_is_on_a_gpu() -> None:
    ours = [
        "void layca::cuda::(anonymous namespace)::rotate<layca::Momentum, float>(layca::cuda::Batch)",
        "void layca::cuda::measure<layca::bases::Adam<true>, double>(layca::cuda::Batch)",
        "_ZN5layca4cuda7prepareINS_4AdamEEEvNS0_5BatchE",
        "finish",
        "measure_0d1d2de",
    ]
    foreign = [
        "Memset (Device)",
        "Memcpy DtoH (Device -> Pinned)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)",
        "void cub::premeasured_kernel<float>(int)",
    ]
    ignored = [
        event("Optimizer.step#FusedLayca.step", annotation=True),
        event("rotate", annotation=True),
        event("measure", DeviceType.CPU),
        event("Memcpy HtoD (Pinned -> Device)"),
    ]
    kernels, others = kernels_and_others([*ignored, *map(event, ours), *map(event, foreign)])
    assert kernels == ["finish", "measure", "measure", "prepare", "rotate"]
    assert others == foreign


def test_an_upload_that_was_interrupted_is_made_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C while the host waits for a buffer: the device must not keep the addresses of earlier gradients."""
    mirror = Mirror(3, 2, torch.int64, torch.device("cpu"))
    mirror._on_host, mirror.device_tensor = False, torch.zeros(3, 2, dtype=torch.int64)
    mirror._buffers = Buffers(lambda: (torch.zeros(3, 2, dtype=torch.int64), FakeEvent()))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    numbers = torch.randint(1, 2**40, (3,)).tolist()

    def interrupted() -> None:
        raise KeyboardInterrupt

    mirror.set_column(1, column(numbers))
    with monkeypatch.context() as patch:
        patch.setattr(mirror._buffers, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mirror.push()
    mirror.set_column(1, column(numbers))
    mirror.push()
    assert mirror.device_tensor[:, 1].tolist() == numbers
