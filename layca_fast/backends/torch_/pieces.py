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


def stacked(matrices: Sequence[Tensor], dtype: torch.dtype, pool: Pool) -> Value:
    """Matrices of one length as one of ``dtype``; of a single matrix of that type itself."""
    first = matrices[0]
    if len(matrices) == 1:
        if first.dtype == dtype:
            return Value(pool, first)
        return Value(pool, pool.take(first.shape, dtype, first.device).copy_(first), owned=True)
    out = pool.take((sum(map(len, matrices)), first.shape[1]), dtype, first.device)
    if first.dtype == dtype:
        torch.cat(list(matrices), out=out)
    else:
        out.copy_(torch.cat(list(matrices)))
    return Value(pool, out, owned=True)


def write(matrices: Sequence[Tensor], value: Tensor) -> None:
    """Write what was :func:`stacked` back to where it came from."""
    if len(matrices) > 1:
        torch._foreach_copy_(list(matrices), value.split([len(matrix) for matrix in matrices]))
    elif value.data_ptr() != matrices[0].data_ptr():
        matrices[0].copy_(value)


@dataclass
class Piece:
    """Matrices of (layers, elements) that are stacked on each other, or one block of one.

    ``rows``: their layers, among those of the batch. ``is_clean``: whether nothing had to be put in the place of
    non-finite elements of this step.
    """

    rows: slice | Tensor
    block: Block | None
    params: list[Tensor]
    remainders: list[Tensor]
    states: list[list[Tensor]]
    is_clean: bool = False

    def weight(self, dtype: torch.dtype, pool: Pool) -> Value:
        """The weights in ``dtype``, which may be the parameter itself."""
        if not self.remainders:
            return stacked(self.params, dtype, pool)
        params = stacked(self.params, self.params[0].dtype, pool)
        rests = stacked(self.remainders, self.remainders[0].dtype, pool)
        return Value(pool, join(params.tensor, rests.tensor))

    def store_weight(self, weight: Tensor, keep: Tensor | None) -> None:
        """Write weights back, except where ``keep``: there, not even the bits of a NaN may change."""
        dtype = self.params[0].dtype
        if not self.remainders:
            pairs = [(self.params, weight.to(dtype))]
        else:
            param, remainder = split(weight, dtype)
            # As integers, raw bits are sure to arrive as they are.
            pairs = [(self.params, param), (self.remainders, remainder)]
            pairs = [([old.view(torch.int16) for old in olds], new.view(torch.int16)) for olds, new in pairs]
        for olds, new in pairs:
            if keep is not None:
                old = olds[0] if len(olds) == 1 else torch.cat(olds)
                new = torch.where(keep, old, new)
            write(olds, new)


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
        self._slots = [batch.slots[i] for i in self.indices]
        self._were_clean: list[bool] = []
        self._pieces: list[Piece] = []
        self._whole: Piece | None = None
        self._has_views = all(map(are_views, self._slots))

    def pieces(self) -> list[Piece]:
        """Its pieces. Where they are no views, :meth:`settle` writes back what is changed."""
        if not self._pieces:
            with out_of_inference():
                self._pieces = list(self._make())
            for piece, was_clean in zip(self._pieces, self._were_clean, strict=False):
                piece.is_clean = was_clean
        return self._pieces

    def _make(self) -> Iterator[Piece]:
        slots, first_layers = self._slots, self._batch.first_layers
        params = [layer_matrix(slot.param, slot) for slot in slots]
        remainders = [layer_matrix(slot.remainder, slot) for slot in slots if slot.remainder is not None]
        states = [
            [layer_matrix(slot.states[i], slot) for slot in slots] for i in range(len(self._batch.formula.states))
        ]
        first = first_layers[self.indices[0]]
        whole = self._whole = Piece(slice(first, first + slots[0].layers), None, params, remainders, states)
        if len(slots) > 1:
            parts = [
                torch.arange(first_layers[i], first_layers[i] + slot.layers)
                for i, slot in zip(self.indices, slots, strict=True)
            ]
            yield replace(whole, rows=torch.cat(parts))
            return
        layers, length = params[0].shape
        if layers * length <= self._tile:
            yield whole
            return
        height = max(1, self._tile // length)
        for row in range(0, layers, height):
            for column in range(0, length, self._tile):
                end = min(row + height, layers)
                block = slice(row, end), slice(column, min(column + self._tile, length))
                cut = [[each[block] for each in matrices] for matrices in (params, remainders, *states)]
                yield Piece(slice(first + row, first + end), block, cut[0], cut[1], cut[2:])

    def gradients(self) -> list[Tensor]:
        """This step's, as matrices."""
        found = []
        for i, slot in zip(self.indices, self._slots, strict=True):
            grad = self._batch.grads[i]
            assert grad is not None
            found.append(layer_matrix(grad, slot))
        return found

    def settle(self, *, weights: bool) -> None:
        """Write back weights, or else states, of tensors whose matrices are no views."""
        if self._has_views or self._whole is None:
            return
        (slot,), whole = self._slots, self._whole
        if weights:
            olds = [slot.param, *([] if slot.remainder is None else [slot.remainder])]
            news = [*whole.params, *whole.remainders]
        else:
            olds, news = list(slot.states), [matrix for (matrix,) in whole.states]
        for old, new in zip(olds, news, strict=True):
            store(old, new)
        # Until the next verb all may change.
        self._were_clean = [piece.is_clean for piece in self._pieces]
        self._pieces, self._whole = [], None
