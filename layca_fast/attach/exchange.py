"""Puts weights back after somebody else's step, and leaves what it did to them in their copies, piece by piece."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..state.layout import is_dense, memory_order

#: Elements at a time: what stays in a CPU's cache; enough for one launch to fill a GPU.
BLOCK_ON_CPU, BLOCK_ELSEWHERE = 2**18, 2**22


def block_on(device: torch.device) -> int:
    """How many elements are taken at a time there."""
    return BLOCK_ON_CPU if device.type == "cpu" else BLOCK_ELSEWHERE


def pieces(tensors: Sequence[Tensor], block: int) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one shape, at most ``block`` elements each; where they lie otherwise, at least one row."""
    first = tensors[0]
    if first.numel() == 0:
        return
    rows = block
    if all(is_dense(each) and each.stride() == first.stride() for each in tensors):
        tensors = [memory_order(each) for each in tensors]
    else:
        rows = max(1, block * first.shape[0] // first.numel())
    yield from zip(*(each.split(rows) for each in tensors), strict=True)


class Exchange:
    """Puts weights back and leaves the step in their copies, piece by piece through a scratch per device and dtype."""

    def __init__(self, weights: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        found: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
        for weight, kept in zip(weights, copies, strict=True):
            found.setdefault((weight.device, weight.dtype), []).extend(pieces((weight, kept), block_on(weight.device)))
        self._bundles: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
        for (device, dtype), pairs in found.items():
            self._bundle(pairs, block_on(device), device, dtype)

    def _bundle(
        self, pairs: Sequence[tuple[Tensor, ...]], block: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Small pieces share a bundle, which a GPU exchanges in three launches."""
        bundles: list[list[tuple[Tensor, ...]]] = []
        filled, largest = block, 0
        for pair in pairs:
            size = pair[0].numel()
            if filled + size > block:
                bundles.append([])
                filled = 0
            bundles[-1].append(pair)
            filled += size
            largest = max(largest, filled)
        scratch = torch.empty(largest, dtype=dtype, device=device)
        for bundle in bundles:
            weights, copies = [weight for weight, _ in bundle], [kept for _, kept in bundle]
            parts = scratch[: sum(weight.numel() for weight in weights)].split([weight.numel() for weight in weights])
            views = [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
            self._bundles.append((weights, copies, views))

    def run(self) -> None:
        """Exchange them."""
        for weights, copies, scratch in self._bundles:
            torch._foreach_copy_(scratch, weights)
            torch._foreach_copy_(weights, copies)
            torch._foreach_sub_(copies, scratch)
