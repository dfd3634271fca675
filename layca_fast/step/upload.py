"""Tables that are written on the host, cell by cell, and read on a device."""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

#: Graphs that may be captured in a row, without a step between them, for which buffers are kept ready.
SPARES = 4

#: Pinned buffers that a table has from the start, and at most: so many steps may be queued before the host waits.
READY, MOST = 4, 16


class Event(Protocol):
    """What is asked of a torch.cuda.Event."""

    def query(self) -> bool:
        """Whether all that it was recorded after is done; also if it never was recorded."""

    def record(self, stream: Any) -> None:
        """Mark the present end of the stream's work."""

    def synchronize(self) -> None:
        """Wait until query() is True."""


class Buffers:
    """Buffers that copies to a device read, each guarded by an event; ``make`` returns a new one with its event."""

    def __init__(self, make: Callable[[], tuple[Tensor, Event]]) -> None:
        self._make = make
        # In the order of their last use.
        self._all = [make() for _ in range(READY)]

    def take(self) -> tuple[Tensor, Event]:
        """A buffer that no copy is reading any more. Waits, for the oldest, only where :data:`MOST` are being read."""
        for index in range(len(self._all)):
            if self._all[index][1].query():
                break
        else:
            if len(self._all) < MOST:
                self._all.append(self._make())
                return self._all[-1]
            index = 0
            self._all[index][1].synchronize()
        self._all.append(self._all.pop(index))
        return self._all[-1]


class Mirror:
    """A (rows, columns) table on the host and its copy on ``device``, refreshed only where something changed.

    ``dtype``: int64, written by columns, or float64, written as a whole.

    On the CPU both are one tensor. On CUDA the host side is a few pinned buffers (:class:`Buffers`): a copy that is
    still in flight is never overwritten, and the host waits only where it is :data:`MOST` changed steps ahead.

    A CUDA graph that has recorded a copy repeats it from the same buffer, so each has one of its own, which is kept as
    long as the table. :meth:`keep_spares` has some ready, as a capture must not allocate pinned memory.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        # Named, because the user may have set another default device.
        self._host = torch.zeros(rows, columns, dtype=dtype, device="cpu")
        # To torch a write of a few numbers is several operations.
        memory = memoryview((ctypes.c_char * self._host.nbytes).from_address(self._host.data_ptr())).cast("B")
        self._cells: Any = memory.cast("q") if dtype == torch.int64 else memory.cast("d")
        self._columns = columns
        self._cached: dict[int, Any] = {}
        self._changed = True
        self._on_host = device.type == "cpu"
        self.device_tensor = self._host if self._on_host else torch.zeros(rows, columns, dtype=dtype, device=device)
        self._graphs: list[Tensor] = []
        self._spares: list[Tensor] = []
        self._buffers = Buffers(self._guarded_buffer) if device.type == "cuda" else None

    def _pinned_buffer(self) -> Tensor:
        return torch.zeros_like(self._host).pin_memory()

    def _guarded_buffer(self) -> tuple[Tensor, Event]:
        return self._pinned_buffer(), torch.cuda.Event()

    def keep_spares(self) -> None:
        """Outside of captures: have buffers ready for the graphs that may be captured next."""
        while not self._on_host and len(self._spares) < SPARES:
            self._spares.append(self._pinned_buffer())

    def can_record(self) -> bool:
        """Whether :meth:`record` has what it needs."""
        return self._on_host or bool(self._spares)

    def set_column(self, column: int, values: bytes) -> None:
        """Write one column, int64 numbers, if they differ from what was written there last."""
        if self._cached.get(column) != values:
            # First, as a signal may interrupt what follows.
            self.forget(column)
            self._changed = True
            self._cells[column :: self._columns] = memoryview(values).cast("q")
            self._cached[column] = values

    def set_all(self, values: Sequence[float]) -> None:
        """Write the whole table, given row by row, if it differs from what was written last."""
        if self._cached.get(-1) != values:
            self.forget(-1)
            self._changed = True
            self._cells[:] = memoryview(array("d", values))
            self._cached[-1] = list(values)

    def forget(self, column: int) -> None:
        """Write the column (-1: all of them) when it is set next, whatever is there: a device may have modified it."""
        self._cached.pop(column, None)

    def holds(self, values: Sequence[float]) -> bool:
        """Whether the device has these values, given row by row."""
        return not self._changed and self._cached.get(-1) == values

    def push(self) -> None:
        """Bring the device's copy up to date, on the current stream, if anything changed."""
        # A replay may have come between, and put there what its graph recorded.
        if not (self._changed or self._graphs):
            return
        if not self._on_host:
            self._upload()
        # Last, as Ctrl-C may end the wait for a buffer.
        self._changed = False

    def _upload(self) -> None:
        if self._buffers is None:
            self.device_tensor.copy_(self._host)
            return
        buffer, copied = self._buffers.take()
        buffer.copy_(self._host)
        self.device_tensor.copy_(buffer, non_blocking=True)
        copied.record(torch.cuda.current_stream(self.device_tensor.device))

    def record(self) -> None:
        """While a CUDA graph is captured: let every replay of it put the present table on the device.

        Call it only where :meth:`can_record`.
        """
        if self._on_host:
            return
        buffer = self._spares.pop()
        buffer.copy_(self._host)
        self._graphs.append(buffer)
        self.device_tensor.copy_(buffer, non_blocking=True)
