"""Tables that are written on the host, cell by cell, and read on a device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Graphs that may be captured in a row, without a step between them, for which buffers are kept ready.
SPARES = 4


class Mirror:
    """A (rows, columns) table on the host and its copy on ``device``, refreshed only where something changed.

    On the CPU both are one tensor. On CUDA the host side is two pinned buffers that take turns, each guarded by an
    event: a copy that is still in flight is never overwritten, and the host does not wait for the current step.

    A CUDA graph that has recorded a copy repeats it from the same buffer, so each has one of its own, which is kept as
    long as the table; ``recorded`` keeps some ready, as not every version of torch has pinned memory during a capture.
    """

    def __init__(
        self, rows: int, columns: int, dtype: torch.dtype, device: torch.device, recorded: bool = False
    ) -> None:
        # Named, because the user may have set another default device.
        self._host = torch.zeros(rows, columns, dtype=dtype, device="cpu")
        self._cached: dict[int, Any] = {}
        self._changed = True
        self._on_host = device.type == "cpu"
        self.device_tensor = self._host if self._on_host else torch.zeros(rows, columns, dtype=dtype, device=device)
        self._pinned: list[tuple[Tensor, torch.cuda.Event]] = []
        self._graphs: list[Tensor] = []
        self._spares: list[Tensor] = []
        self._recorded = recorded
        if device.type == "cuda":
            self._pinned = [(self._pinned_buffer(), torch.cuda.Event()) for _ in range(2)]
            self._make_spares()

    def _pinned_buffer(self) -> Tensor:
        return torch.zeros_like(self._host).pin_memory()

    def _make_spares(self) -> None:
        while self._recorded and len(self._spares) < SPARES:
            self._spares.append(self._pinned_buffer())

    def set_column(self, column: int, values: bytes) -> None:
        """Write one column, int64 numbers, if they differ from what was written there last."""
        if self._cached.get(column) != values:
            self._host[:, column] = torch.frombuffer(bytearray(values), dtype=torch.int64).to(self._host.dtype)
            self._cached[column] = values
            self._changed = True

    def set_all(self, values: Sequence[float]) -> None:
        """Write the whole table, given row by row, if it differs from what was written last."""
        if self._cached.get(-1) != values:
            self._host.copy_(torch.tensor(values, dtype=self._host.dtype, device="cpu").view_as(self._host))
            self._cached[-1] = list(values)
            self._changed = True

    def forget(self, column: int) -> None:
        """Write the column at the next :meth:`set_column`, whatever is there: a device has modified its copy."""
        self._cached.pop(column, None)

    def holds(self, values: Sequence[float]) -> bool:
        """Whether the device has these values, given row by row."""
        return not self._changed and self._cached.get(-1) == values

    def push(self) -> None:
        """Bring the device's copy up to date, on the current stream, if anything changed."""
        # A replay may have come between, and put there what its graph recorded.
        if not (self._changed or self._graphs):
            return
        self._changed = False
        if self._on_host:
            return
        if not self._pinned:
            self.device_tensor.copy_(self._host)
            return
        self._make_spares()
        buffer, copied = self._pinned[0]
        self._pinned.reverse()
        copied.synchronize()
        buffer.copy_(self._host)
        self.device_tensor.copy_(buffer, non_blocking=True)
        copied.record(torch.cuda.current_stream(self.device_tensor.device))

    def record(self) -> None:
        """While a CUDA graph is captured: let every replay of it put the present table on the device."""
        if self._on_host:
            return
        buffer = self._spares.pop() if self._spares else self._pinned_buffer()
        buffer.copy_(self._host)
        self._graphs.append(buffer)
        self.device_tensor.copy_(buffer, non_blocking=True)
