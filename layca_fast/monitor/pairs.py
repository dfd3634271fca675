"""The three dots of tensors with others of the same shapes, per layer, by the kernels that measure a step.

To a backend the second of a pair is the gradient of the first under plain SGD, so that measure finds <w,w>, <w,v> and
<v,v> in one pass and float64, in a fixed order, with a fixed number of launches however many tensors there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..formulas.bases import BASES
from ..state.layout import layers_are_dense, memory_order, scalar_device
from ..state.slot import Slot
from ..step.backend import Backend
from ..step.batch import Batch

#: Elements that are brought together at a time where one of a pair lies elsewhere or in another type.
BLOCK_ON_CPU, BLOCK_ELSEWHERE = 2**18, 2**24

_GROUP: Mapping[str, Any] = {
    **BASES["sgd"].options,
    "base": "sgd",
    "rule": "layca",
    "radius": "current",
    "radius_lr": 0.0,
    "joins_at": 0.0,
    "lr": 0.0,
    "weight_decay": 0.0,
    "maximize": False,
}


@dataclass
class _Piece:
    """Whole layers of a pair, or a part of one. ``rows``: of the table of dots."""

    weight: Tensor
    other: Tensor
    rows: range
    dense: bool


def _pieces(piece: _Piece, block: int) -> Iterator[_Piece]:
    """Parts of at most ``block`` elements, as far as their memory can be divided."""
    layers, size = len(piece.rows), piece.weight.numel()
    if not piece.dense or size <= block:
        yield piece
        return
    length = size // layers
    height = max(1, block // length)
    weight, other = (memory_order(tensor).view(layers, length) for tensor in (piece.weight, piece.other))
    for row in range(0, layers, height):
        rows = piece.rows[row : row + height]
        for column in range(0, length, block):
            part = slice(row, row + height), slice(column, column + block)
            yield _Piece(weight[part].flatten(), other[part].flatten(), rows, dense=True)


def _slot(weight: Tensor, other: Tensor, layers: int, dense: bool) -> Slot:
    alias = weight.detach()
    alias.grad = other
    return Slot(
        param=alias,
        group=_GROUP,
        base=BASES["sgd"],
        label="a watched weight",
        states=(),
        step=None,
        radius=None,
        layers=layers,
        dense=dense,
        fresh=False,
    )


@dataclass
class _Bundle:
    """Pairs that are measured at once, after copies into scratch memory where that is needed."""

    backend: Backend
    slots: list[Slot] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    def finish(self) -> None:
        self.batch = Batch(BASES["sgd"].formula(_GROUP), self.slots, self.backend.tile)
        self.index = torch.tensor(self.rows, dtype=torch.int64, device=self.batch.dots.device)

    def add_to(self, dots: Tensor) -> None:
        if self.targets:
            # Pinned memory, and the order of one stream, spare the host from waiting.
            torch._foreach_copy_(self.targets, self.sources, non_blocking=True)
        self.batch.take_gradients()
        self.batch.refresh()
        self.backend.measure(self.batch)
        self.batch.release()
        # No layer has two rows in one bundle, so the order of the additions is fixed.
        dots.index_add_(
            0, self.index.to(dots.device, non_blocking=True), self.batch.dots.to(dots.device, non_blocking=True)
        )


def _like(tensor: Tensor, memory: Tensor, first: int) -> Tensor:
    """``memory`` from element ``first`` on, seen in the shape and the order of dimensions of ``tensor``."""
    form = torch.empty_like(tensor, device="meta")
    return memory.as_strided(form.shape, form.stride(), first)


def home_of(tensors: Sequence[Tensor]) -> torch.device:
    """Where the dots of tensors on perhaps several devices are collected."""
    devices = [scalar_device(tensor.device) for tensor in tensors]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


class Pairs:
    """Measures each of ``weights`` with the same of ``others``, of equal shapes.

    ``layers`` is how many each holds: rows of ``tensor.reshape(layers, -1)``. Tensors with one run of memory each lie
    in the same order of dimensions in both. The memory is kept in use: make another where weights or others move.
    """

    def __init__(
        self, weights: Sequence[Tensor], others: Sequence[Tensor], layers: Sequence[int], backend: str
    ) -> None:
        self._layers = sum(layers)
        self._home = home_of(weights)
        groups: dict[tuple[Any, ...], list[_Piece]] = {}
        for weight, other, count, first in zip(weights, others, layers, accumulate(layers, initial=0), strict=False):
            if weight.numel() == 0:
                continue
            dense = layers_are_dense(weight, count)
            chosen = choose(backend, weight.device)
            if chosen.needs_dense and not dense:
                chosen = choose("torch", weight.device)
            dtype = torch.promote_types(weight.dtype, other.dtype)
            direct = weight.dtype == other.dtype and weight.device == other.device
            piece = _Piece(weight.detach(), other, range(first, first + count), dense)
            groups.setdefault((chosen.name, weight.device, dtype, direct), []).append(piece)
        self._bundles: list[_Bundle] = []
        for (name, device, dtype, direct), pieces in groups.items():
            if direct:
                self._add_direct(choose(name, device), pieces)
            else:
                self._add_copied(choose(name, device), dtype, pieces)
        for bundle in self._bundles:
            bundle.finish()

    def _add_direct(self, backend: Backend, pieces: Sequence[_Piece]) -> None:
        bundle = _Bundle(backend)
        for piece in pieces:
            bundle.slots.append(_slot(piece.weight, piece.other, len(piece.rows), piece.dense))
            bundle.rows.extend(piece.rows)
        self._bundles.append(bundle)

    def _add_copied(self, backend: Backend, dtype: torch.dtype, pieces: Sequence[_Piece]) -> None:
        device = pieces[0].weight.device
        block = BLOCK_ON_CPU if device.type == "cpu" else BLOCK_ELSEWHERE
        parts = [part for piece in pieces for part in _pieces(piece, block)]
        # Weights of another type than the pair is measured in are copied, too.
        widen = any(part.weight.dtype != dtype for part in parts)
        limit = block * (1 + widen)
        largest = max(part.weight.numel() for part in parts) * (1 + widen)
        total = sum(part.weight.numel() for part in parts) * (1 + widen)
        scratch, filled = torch.empty(max(largest, min(limit, total)), dtype=dtype, device=device), limit
        for part in parts:
            if filled + part.weight.numel() * (1 + widen) > limit:
                self._bundles.append(_Bundle(backend))
                filled = 0
            bundle = self._bundles[-1]
            sources = [part.other, part.weight] if widen else [part.other]
            targets = [_like(part.weight, scratch, filled + i * part.weight.numel()) for i in range(len(sources))]
            bundle.sources += sources
            bundle.targets += targets
            filled += len(sources) * part.weight.numel()
            weight = targets[1] if widen else part.weight
            bundle.slots.append(_slot(weight, targets[0], len(part.rows), part.dense))
            bundle.rows.extend(part.rows)

    def measure(self) -> Tensor:
        """<w,w>, <w,v> and <v,v> of each layer: (layers, 3) float64, of weights w and others v as they are now.

        Non-finite elements of v count as zero; those of w make the dots non-finite. Does not wait for a GPU.
        """
        dots = torch.zeros(self._layers, 3, dtype=torch.float64, device=self._home)
        for bundle in self._bundles:
            bundle.add_to(dots)
        return dots
