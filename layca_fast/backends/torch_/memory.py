"""Memory for what is only needed for a moment.

New memory costs more than what is computed in it: the system clears each page when it is touched first. So buffers are
kept, for as long as there is a batch that they were kept for.
"""

from collections.abc import Sequence
from math import prod
from weakref import ref

import torch
from torch import Tensor

from ...state.modes import out_of_inference

#: Buffers of one type and size that are kept at most: about as many as the longest formula has in use. Of all sizes up
#: to that of a tile these are 25 MiB in float32, and 50 in float64.
MOST = 12


class Pool:
    """Flat buffers on the CPU, kept by type and size; of other devices torch keeps the memory by itself.

    Any number of threads may take and give at once.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.dtype, int], list[Tensor]] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """A tensor of this shape, with anything in it, and the buffer that it lies in: to be given back."""
        numel = prod(shape)
        # A power of two, so that few sizes serve all.
        room = 1 << (max(numel, 1) - 1).bit_length()
        free = self._free.get((dtype, room), []) if device.type == "cpu" else []
        try:
            buffer = free.pop()
        except IndexError:
            with out_of_inference():
                buffer = torch.empty(room, dtype=dtype, device=device)
        return buffer[:numel].view(shape), buffer

    def give(self, buffer: Tensor) -> None:
        """Keep what was taken, for who takes next."""
        # What a mode has made in the place of a tensor is for that mode alone.
        if buffer.device.type == "cpu" and type(buffer) is Tensor:
            free = self._free.setdefault((buffer.dtype, buffer.numel()), [])
            if len(free) < MOST:
                free.append(buffer)


_shared: ref[Pool] | None = None


def shared_pool() -> Pool:
    """The pool of all who hold one."""
    global _shared
    pool = None if _shared is None else _shared()
    if pool is None:
        pool = Pool()
        _shared = ref(pool)
    return pool
