"""What one operation works on: a stack of small tensors that are stepped alike, or a block of a large one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...state.compensation import join, split
from ...state.layout import memory_order, scalar_device
from ...state.modes import out_of_inference
from ...state.slot import Slot
from ...step.batch import Batch
from .arithmetic import Pool, Value

#: (rows, columns) of a matrix of layers.
Block = tuple[slice, slice]


def layer_matrix(tensor: Tensor, slot: Slot) -> Tensor:
    """A tensor of ``slot`` as (layers, elements of one layer) where the dots live: a view if memory allows it."""
    matrix = memory_order(tensor).view(slot.layers, -1) if slot.dense else tensor.reshape(slot.layers, -1)
    return matrix.to(scalar_device(tensor.device))


def store(tensor: Tensor, matrix: Tensor) -> None:
    """Write a matrix of ``layer_matrix`` back to ``tensor``; nothing to do where it is a view of it."""
    if matrix.data_ptr() != tensor.data_ptr():
        tensor.copy_(matrix.view(tensor.shape))


def are_views(slot: Slot) -> bool:
    """Whether ``layer_matrix`` gives views of the tensors of ``slot``."""
    return slot.dense and scalar_device(slot.param.device) == slot.param.device


def are_alike(slots: Sequence[Slot]) -> bool:
    """Whether tensors of ``slots`` can be put on each other as they are: torch walks such lists by itself."""
    sizes = slots[0].param.shape[1:]
    return all(slot.param.dim() > 0 and slot.param.shape[1:] == sizes and slot.param.is_contiguous() for slot in slots)


@dataclass
class Parts:
    """Tensors that are one matrix of ``shape``: on each other, or a single one that is that matrix.

    ``heights``: their sizes along the first dimension.
    """

    tensors: list[Tensor]
    heights: list[int]
    shape: tuple[int, int]

    def stacked(self, dtype: torch.dtype, pool: Pool) -> Value:
        """The matrix in ``dtype``; of a single one of that type itself."""
        first = self.tensors[0]
        if len(self.tensors) == 1:
            if first.dtype == dtype:
                return Value(pool, first)
            return Value(pool, pool.take(self.shape, dtype, first.device).copy_(first), owned=True)
        out = pool.take(self.shape, dtype, first.device)
        if first.dtype == dtype:
            torch.cat(self.tensors, out=self._laid(out))
        else:
            out.copy_(torch.cat(self.tensors).view(self.shape))
        return Value(pool, out, owned=True)

    def _laid(self, matrix: Tensor) -> Tensor:
        """``matrix`` with the dimensions of the tensors."""
        return matrix.view(-1, *self.tensors[0].shape[1:])

    def write(self, matrix: Tensor) -> None:
        """Write what was :meth:`stacked` back to where it came from."""
        if len(self.tensors) > 1:
            torch._foreach_copy_(self.tensors, self._laid(matrix).split(self.heights))
        elif matrix.data_ptr() != self.tensors[0].data_ptr():
            self.tensors[0].copy_(matrix)

    def as_integers(self) -> "Parts":
        """The raw bits of numbers of 16 bits: as integers, they are sure to arrive as they are."""
        return replace(self, tensors=[each.view(torch.int16) for each in self.tensors])


def parts_of(matrices: Sequence[Tensor]) -> Parts:
    """Those of matrices that are as long as each other."""
    heights = [matrix.shape[0] for matrix in matrices]
    return Parts(list(matrices), heights, (sum(heights), matrices[0].shape[1]))


@dataclass
class Piece:
    """Matrices of (layers, elements) that are stacked on each other, or one block of one.

    ``rows``: their layers, among those of the batch. ``kept``: its step. ``is_clean``: whether nothing had to be put in
    the place of non-finite elements of this step.
    """

    rows: slice | Tensor
    block: Block | None
    params: Parts
    remainders: Parts | None
    states: list[Parts]
    kept: Value | None = None
    is_clean: bool = False

    def weight(self, dtype: torch.dtype, pool: Pool) -> Value:
        """The weights in ``dtype``, which may be the parameter itself."""
        if self.remainders is None:
            return self.params.stacked(dtype, pool)
        params = self.params.stacked(self.params.tensors[0].dtype, pool)
        rests = self.remainders.stacked(self.remainders.tensors[0].dtype, pool)
        return Value(pool, join(params.tensor, rests.tensor))

    def store_weight(self, weight: Tensor, keep: Tensor | None, pool: Pool) -> None:
        """Write weights back, except where ``keep``: there, not even the bits of a NaN may change."""
        dtype = self.params.tensors[0].dtype
        if self.remainders is None:
            pairs = [(self.params, weight.to(dtype))]
        else:
            param, remainder = split(weight, dtype)
            pairs = [(self.params, param), (self.remainders, remainder)]
            pairs = [(old.as_integers(), new.view(torch.int16)) for old, new in pairs]
        for old, new in pairs:
            if keep is None:
                old.write(new)
            else:
                before = old.stacked(new.dtype, pool)
                old.write(torch.where(keep, before.tensor, new))


class Run:
    """Slots of a batch that are stepped by the same operations, with the same ``options`` and ``scale``.

    Several of them are one piece, and their matrices are views. ``tile``: elements of a block of a single one.
    """

    def __init__(self, batch: Batch, indices: Sequence[int], tile: int) -> None:
        self.indices = list(indices)
        self.options: tuple[float | Tensor, ...] = ()
        #: What the gradient is multiplied by: a float, or a 0-d tensor on the device.
        self.scale: float | Tensor = 1.0
        self._batch, self._tile = batch, tile
        self.slots = [batch.slots[i] for i in self.indices]
        self._were_clean: list[bool] = []
        self._pieces: list[Piece] = []
        self._whole: Piece | None = None
        self._has_views = all(map(are_views, self.slots))
        self._are_alike = len(self.slots) > 1 and are_alike(self.slots)

    def pieces(self) -> list[Piece]:
        """Its pieces. Where they are no views, :meth:`settle` writes back what is changed."""
        if not self._pieces:
            with out_of_inference():
                self._pieces = list(self._make())
            for piece, was_clean in zip(self._pieces, self._were_clean, strict=False):
                piece.is_clean = was_clean
        return self._pieces

    def _make(self) -> Iterator[Piece]:
        slots, first_layers = self.slots, self._batch.first_layers
        count = len(self._batch.formula.states)
        params = self._parts([slot.param for slot in slots])
        rests = [slot.remainder for slot in slots if slot.remainder is not None]
        remainders = self._parts(rests) if rests else None
        states = [self._parts([slot.states[i] for slot in slots]) for i in range(count)]
        first = first_layers[self.indices[0]]
        whole = self._whole = Piece(slice(first, first + slots[0].layers), None, params, remainders, states)
        if len(slots) > 1:
            parts = [
                torch.arange(first_layers[i], first_layers[i] + slot.layers)
                for i, slot in zip(self.indices, slots, strict=True)
            ]
            yield replace(whole, rows=torch.cat(parts))
            return
        layers, length = params.shape
        if layers * length <= self._tile:
            yield whole
            return
        height = max(1, self._tile // length)
        for row in range(0, layers, height):
            for column in range(0, length, self._tile):
                end = min(row + height, layers)
                block = slice(row, end), slice(column, min(column + self._tile, length))
                cut = [None if each is None else parts_of([each.tensors[0][block]]) for each in (remainders, *states)]
                weights = parts_of([params.tensors[0][block]])
                rows = slice(first + row, first + end)
                yield Piece(rows, block, weights, cut[0], [each for each in cut[1:] if each is not None])

    def _parts(self, tensors: Sequence[Tensor]) -> Parts:
        """The matrix of tensors that lie as the parameters do."""
        if self._are_alike:
            rows = sum(slot.layers for slot in self.slots)
            heights = [tensor.shape[0] for tensor in tensors]
            return Parts(list(tensors), heights, (rows, self.slots[0].param.numel() // self.slots[0].layers))
        return parts_of([layer_matrix(each, slot) for each, slot in zip(tensors, self.slots, strict=True)])

    def gradients(self) -> Parts:
        """This step's."""
        grads = [self._batch.grads[i] for i in self.indices]
        return self._parts([grad for grad in grads if grad is not None])

    def settle(self, *, weights: bool) -> None:
        """Write back weights, or else states, of tensors whose matrices are no views."""
        if self._has_views or self._whole is None:
            return
        (slot,), whole = self.slots, self._whole
        if weights:
            olds = [slot.param, *([] if slot.remainder is None else [slot.remainder])]
            news = [whole.params, *([] if whole.remainders is None else [whole.remainders])]
        else:
            olds, news = list(slot.states), whole.states
        for old, new in zip(olds, news, strict=True):
            store(old, new.tensors[0])
        # Until the next verb all may change.
        self._were_clean = [piece.is_clean for piece in self._pieces]
        self._pieces, self._whole = [], None
