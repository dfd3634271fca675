"""A GPU whose work lies in queues until something makes it run, for tests of the order of copies, launches and events.

Tensors are on the CPU. What torch would do on a GPU is queued on the current stream instead, and so are the launches of
the emulated kernels: when they run is drawn, or put off until the host waits. It raises where a host that is ahead
would spoil a copy, and where a capture would do what none may.
"""

import ctypes
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layca_fast.step import capture
from layca_fast.step.upload import Buffers, Mirror

from .support import driver_of

_LAUNCHED = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64)


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        return tensors_in(list(values.values()))
    return [each for value in values for each in tensors_in(value)] if isinstance(values, (list, tuple)) else []


@dataclass
class Work:
    """Something that a stream is to do: ``reads`` a pinned buffer, ``waits`` for another piece of work."""

    name: str
    run: Callable[[], object]
    reads: int = 0
    waits: "Work | None" = None
    is_done: bool = False


@dataclass
class Stream:
    handle: int
    queue: deque[Work] = field(default_factory=deque)
    last: Work | None = None

    @property
    def cuda_stream(self) -> int:
        return self.handle

    def can_run(self) -> bool:
        return bool(self.queue) and (self.queue[0].waits is None or self.queue[0].waits.is_done)


class FakeEvent:
    """A torch.cuda.Event of the fake GPU."""

    def __init__(self, gpu: "FakeGpu") -> None:
        self._gpu, self._work = gpu, Work("event", lambda: None, is_done=True)

    def query(self) -> bool:
        self._gpu.refuse_in_captures("to ask an event")
        return self._work.is_done

    def record(self, stream: Stream) -> None:
        self._work = Work("event", lambda: None)
        self._gpu.queue(self._work, stream)

    def synchronize(self) -> None:
        self._gpu.refuse_in_captures("to wait for an event")
        self._gpu.waited += not self._work.is_done
        while not self._work.is_done:
            self._gpu.run_one()


class Graph:
    def __init__(self, gpu: "FakeGpu") -> None:
        self._gpu, self.work = gpu, list[Work]()

    def replay(self) -> None:
        for each in self.work:
            self._gpu.queue(Work(each.name, each.run, each.reads))


class FakeGpu(TorchDispatchMode):
    """``eagerness``: how often it does a piece of work when the host queues one; at 0 it waits until the host does."""

    def __init__(self, emulator: ModuleType, seed: int, eagerness: float) -> None:
        super().__init__()
        self._driver = driver_of(emulator)
        self._driver.layca_emulator_run.restype = ctypes.c_char_p
        self._driver.layca_emulator_run.argtypes = [ctypes.c_int64]
        self._on_launch = _LAUNCHED(self._launched)
        self._random, self._eagerness = random.Random(seed), eagerness
        self._hosts: set[int] = set()
        self._rates: set[int] = set()
        #: Pinned buffers, and of them those that belong to a graph.
        self._pinned: dict[int, Tensor] = {}
        self._of_graphs: set[int] = set()
        self.streams = [Stream(1)]
        self.current = self.streams[0]
        self.graph: Graph | None = None
        #: What was queued, by name; how often the host has waited; launches that are refused.
        self.log: list[str] = []
        self.waited = 0
        self.refused: set[str] = set()
        self._is_working = False
        self._is_host = False
        self._kept: list[Any] = []
        #: Called when a kernel is launched; what it returns is called when the kernel runs.
        self.check: Callable[[], Callable[[], None]] = lambda: lambda: None

    # What the host calls.

    def new_stream(self) -> Stream:
        self.streams.append(Stream(len(self.streams) + 1))
        return self.streams[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def wait_stream(self, waits: Stream, other: Stream) -> None:
        if other.last is not None:
            self.queue(Work("wait", lambda: None, waits=other.last), waits)

    @contextmanager
    def keeping_up(self) -> Iterator[None]:
        """All is done when it is queued: for first steps, in which the host reads what the device has made."""
        before, self._eagerness = self._eagerness, 1.0
        try:
            yield
        finally:
            self._eagerness = before

    def synchronize(self) -> None:
        self.refuse_in_captures("to wait for the device")
        while any(stream.queue for stream in self.streams):
            self.run_one()

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        graph = self.graph = Graph(self)
        try:
            yield graph
        finally:
            self.graph = None

    # What it does.

    def refuse_in_captures(self, what: str) -> None:
        if self.graph is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    def queue(self, work: Work, stream: Stream | None = None) -> None:
        self.log.append(work.name)
        if self.graph is not None:
            self.graph.work.append(work)
            if work.reads:
                self._of_graphs.add(work.reads)
            return
        stream = stream or self.current
        stream.queue.append(work)
        stream.last = work
        while self._random.random() < self._eagerness and any(each.queue for each in self.streams):
            self.run_one()

    def run_one(self) -> None:
        """The next piece of work of any stream that can go on."""
        able = [stream for stream in self.streams if stream.can_run()]
        assert able, "the streams wait for one another"
        work = self._random.choice(able).queue.popleft()
        self._is_working = True
        try:
            # What torch queues on a device it has seen from autograd's side before.
            with torch._C._AutoDispatchBelowAutograd():
                work.run()
        finally:
            self._is_working = False
        work.is_done = True

    def _launched(self, stream: int, verb: bytes, ticket: int) -> int:
        name = verb.decode()
        if name in self.refused:
            return 1
        arrived = self.check() if self.graph is None else lambda: None

        def run() -> None:
            arrived()
            failed = self._driver.layca_emulator_run(ticket)
            assert failed is None, failed

        (on,) = [each for each in self.streams if each.handle == stream]
        self.queue(Work(name, run), on)
        return 0

    def pinned_buffer(self, like: Tensor) -> Tensor:
        self.refuse_in_captures("to allocate pinned memory")
        # Not by zeros_like, which would be work for the device.
        buffer = torch.zeros(like.shape, dtype=like.dtype)
        self._pinned[memory_of(buffer)] = buffer
        self._hosts.add(memory_of(buffer))
        return buffer

    def is_rate(self, tensor: Tensor) -> None:
        """It may be read at any time: the checks of rates do so on the CPU, and on a GPU they do not."""
        self._rates.add(memory_of(tensor))

    def is_host(self, tensor: Tensor) -> None:
        """From now on it is in the host's memory, where all else is in the device's."""
        self._hosts.add(memory_of(tensor))

    def _written_by_host(self, tensor: Tensor) -> None:
        memory = memory_of(tensor)
        pending = [work for stream in self.streams for work in stream.queue if work.reads == memory]
        assert not pending, "the host writes to a pinned buffer that a copy has yet to read"
        assert memory not in self._of_graphs, "the host writes to a pinned buffer that a graph reads"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in([args, kwargs])
        if self._is_working or func.namespace == "profiler" or not inputs:
            return func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default and args[0] is args[1]:
            # So steps tell modes, as this is, of what kernels write.
            return args[0]
        if func is torch.ops.aten._local_scalar_dense.default and memory_of(inputs[0]) not in self._hosts | self._rates:
            self.waited += 1
            self.synchronize()
        arguments = func._schema.arguments
        named = {**dict(zip((each.name for each in arguments), args, strict=False)), **kwargs}
        written = [named[each.name] for each in arguments if each.is_write and each.name in named]
        if written:
            targets = tensors_in(written)
            if memory_of(targets[0]) in self._hosts:
                self._written_by_host(targets[0])
                return func(*args, **kwargs)
            reads = next((memory_of(each) for each in inputs if memory_of(each) in self._pinned), 0)
            name = "upload" if reads else func._schema.name.removeprefix("aten::")
            self.queue(Work(name, lambda: func(*args, **kwargs), reads))
            return written[0] if func._schema.returns else None
        # For its shape; what it holds is made again when its turn comes.
        result = func(*args, **kwargs)
        known = {memory_of(each) for each in inputs}
        made = [each for each in tensors_in(result) if memory_of(each) not in known and each.numel() > 0]
        if made and not self._is_host:

            def again() -> None:
                for old, new in zip(tensors_in(result), tensors_in(func(*args, **kwargs)), strict=True):
                    old.copy_(new)

            # Kept, as torch's allocator would not give its memory to others before the device is done with it.
            self._kept.append(result)
            self.queue(Work(func._schema.name.removeprefix("aten::"), again))
        return result

    def __enter__(self) -> Any:
        self._patch = pytest.MonkeyPatch()
        make, column, whole = Mirror.__init__, Mirror.set_column, Mirror.set_all

        def elsewhere(mirror: Mirror, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
            make(mirror, rows, columns, dtype, device)
            self.is_host(mirror._host)
            mirror._on_host, mirror.device_tensor = False, torch.zeros(rows, columns, dtype=dtype)
            mirror._buffers = Buffers(mirror._guarded_buffer)

        def on_host(method: Callable[..., None]) -> Callable[..., None]:
            def patched(*args: Any) -> None:
                self._is_host = True
                method(*args)
                self._is_host = False

            return patched

        self._patch.setattr(Mirror, "__init__", elsewhere)
        self._patch.setattr(Mirror, "set_column", on_host(column))
        self._patch.setattr(Mirror, "set_all", on_host(whole))
        self._patch.setattr(Mirror, "_pinned_buffer", lambda mirror: self.pinned_buffer(mirror._host))
        self._patch.setattr(capture, "RECORDED_DEVICES", ("cuda", "cpu"))
        self._patch.setattr(torch.cuda, "Event", lambda: FakeEvent(self))
        self._patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        self._patch.setattr(torch.cuda, "is_initialized", lambda: True)
        self._patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.graph is not None)
        self._driver.layca_emulator_queue(self._on_launch)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._driver.layca_emulator_queue(None)
        self._patch.undo()
