"""Memory that many batches need for a moment, one after the other."""

import torch
from torch import Tensor

#: How much larger a buffer is made that has to grow: the batches that know the old one keep it.
GROWTH = 1.5


class Scratch:
    """Flat buffers by use, device and type, kept from step to step. What lies in one lasts until its next user."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(self, use: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The first ``numel`` elements of the buffer; their memory stays where it is for as long as they are held."""
        key = use, device, dtype
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            room = numel if buffer is None else max(numel, int(GROWTH * buffer.numel()))
            buffer = self._buffers[key] = torch.empty(room, dtype=dtype, device=device)
        return buffer[:numel]
