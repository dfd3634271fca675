"""What one operation works on: a stack of small tensors that are stepped alike, or a block of a large one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...state.compensation import join, split
from ...state.layout import memory_order, scalar_device
from ...state.slot import Slot
from .arithmetic import Value, copied, empty
from .memory import Pool

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


def copy_all(olds: list[Tensor], news: list[Tensor]) -> None:
    """Write each of ``news`` to its old: those of a list together."""
    if len(olds) > 1:
        torch._foreach_copy_(olds, news)
    elif olds:
        # Older modes of torch that watch writes take no lists.
        olds[0].copy_(news[0])


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
            return Value(pool, first) if first.dtype == dtype else copied(pool, first, dtype)
        matrix = empty(pool, self.shape, dtype, first.device)
        if first.dtype == dtype:
            torch.cat(self.tensors, out=self._laid(matrix.tensor))
        else:
            matrix.tensor.copy_(torch.cat(self.tensors).view(self.shape))
        return matrix

    def _laid(self, matrix: Tensor) -> Tensor:
        """``matrix`` with the dimensions of the tensors."""
        return matrix.view(-1, *self.tensors[0].shape[1:])

    def write(self, matrix: Tensor) -> None:
        """Write what was :meth:`stacked` back to where it came from."""
        if len(self.tensors) > 1:
            copy_all(self.tensors, list(self._laid(matrix).split(self.heights)))
        elif matrix.data_ptr() != self.tensors[0].data_ptr():
            self.tensors[0].copy_(matrix)

    def cut(self, block: Block | None) -> "Parts":
        """The block of a single one; None: all."""
        return self if block is None else parts_of([self.tensors[0][block]])

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

    ``rows``: their layers, among those of the batch. ``number``: its place among the pieces of a run.
    """

    number: int
    rows: slice | Tensor
    block: Block | None
    params: Parts
    remainders: Parts | None
    states: list[Parts]

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
