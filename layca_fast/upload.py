"""Tables that are written on the host, cell by cell, and read on a device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Mirror:
    """A (rows, columns) table on the host and its copy on ``device``, refreshed only where something changed.

    On the CPU both are one tensor. On CUDA the host side is two pinned buffers that take turns, each guarded by an
    event: a copy that is still in flight is never overwritten, and the host does not wait for the current step.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        # Named, because the user may have set another default device.
        self._host = torch.zeros(rows, columns, dtype=dtype, device="cpu")
        self._cached: dict[int, Any] = {}
        self._changed = True
        self._on_host = device.type == "cpu"
        self.device_tensor = self._host if self._on_host else torch.zeros(rows, columns, dtype=dtype, device=device)
        self._pinned: list[tuple[Tensor, torch.cuda.Event]] = []
        if device.type == "cuda":
            self._pinned = [(torch.zeros_like(self._host).pin_memory(), torch.cuda.Event()) for _ in range(2)]

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

    def push(self) -> None:
        """Bring the device's copy up to date, on the current stream, if anything changed."""
        if not self._changed:
            return
        self._changed = False
        if self._on_host:
            return
        if not self._pinned:
            self.device_tensor.copy_(self._host)
            return
        buffer, copied = self._pinned[0]
        self._pinned.reverse()
        copied.synchronize()
        buffer.copy_(self._host)
        self.device_tensor.copy_(buffer, non_blocking=True)
        copied.record(torch.cuda.current_stream(self.device_tensor.device))
