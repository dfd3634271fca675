"""Tensors that are stepped by the same operations, cut into pieces."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...state.modes import out_of_inference
from ...state.slot import Slot
from .pieces import Parts, Piece, are_alike, are_views, layer_matrix, parts_of, store


class Run:
    """``slots``, with the same ``options`` and ``scale``. Several are one piece, a single one is cut into blocks.

    ``indices``: their places in the batch. ``first_layers``: where the layers of each begin among those of the batch.
    ``tile``: elements of a block.
    """

    def __init__(self, slots: Sequence[Slot], indices: Sequence[int], first_layers: Sequence[int], tile: int) -> None:
        self.slots, self.indices = list(slots), list(indices)
        self._first_layers, self._tile = list(first_layers), tile
        self.options: tuple[float | Tensor, ...] = ()
        #: What the gradient is multiplied by: a float, or a 0-d tensor on the device.
        self.scale: float | Tensor = 1.0
        #: Numbers of the pieces of which, in this step, something that is not finite had to be replaced.
        self.unclean: set[int] = set()
        self._pieces: list[Piece] = []
        self._whole: Piece | None = None
        self._has_views = all(map(are_views, self.slots))
        self._are_alike = len(self.slots) > 1 and are_alike(self.slots)

    @property
    def numel(self) -> int:
        return sum(slot.param.numel() for slot in self.slots)

    def begin(self) -> None:
        """Before a step: forget what the last one may have left."""
        self.unclean.clear()
        self._forget()

    def _forget(self) -> None:
        """Let go of copies, which may be out of date, and of views.

        These hold memory that a parameter may leave, and a reference that torch.utils.swap_tensors does not bear.
        """
        if not self._are_alike:
            self._pieces, self._whole = [], None

    def pieces(self) -> list[Piece]:
        """Its pieces, until the step is over. Where they are no views, :meth:`settle` writes back what is changed."""
        if not self._pieces:
            with out_of_inference():
                self._pieces = list(self._make())
        return self._pieces

    def _make(self) -> Iterator[Piece]:
        slots = self.slots
        params = self.parts([slot.param for slot in slots])
        rests = [slot.remainder for slot in slots if slot.remainder is not None]
        remainders = self.parts(rests) if rests else None
        states = [self.parts(same) for same in zip(*(slot.states for slot in slots), strict=True)]
        whole = self._whole = Piece(0, self._rows(params), None, params, remainders, states)
        layers, length = params.shape
        if len(slots) > 1 or layers * length <= self._tile:
            yield whole
            return
        height, number = max(1, self._tile // length), 0
        for row in range(0, layers, height):
            end = min(row + height, layers)
            rows = slice(self._first_layers[0] + row, self._first_layers[0] + end)
            for column in range(0, length, self._tile):
                block = slice(row, end), slice(column, min(column + self._tile, length))
                rest = None if remainders is None else remainders.cut(block)
                yield Piece(number, rows, block, params.cut(block), rest, [state.cut(block) for state in states])
                number += 1

    def _rows(self, params: Parts) -> slice | Tensor:
        """The layers of all of it among those of the batch."""
        if len(self.slots) == 1:
            return slice(self._first_layers[0], self._first_layers[0] + self.slots[0].layers)
        spans = zip(self._first_layers, self.slots, strict=True)
        rows = [first + layer for first, slot in spans for layer in range(slot.layers)]
        return torch.tensor(rows, dtype=torch.int64, device=params.tensors[0].device)

    def parts(self, tensors: Sequence[Tensor]) -> Parts:
        """The matrix of tensors that lie as the parameters do."""
        if self._are_alike:
            layers = [slot.layers for slot in self.slots]
            heights = [tensor.shape[0] for tensor in tensors]
            shape = sum(layers), tensors[0].numel() // layers[0]
            return Parts(list(tensors), heights, shape)
        return parts_of([layer_matrix(each, slot) for each, slot in zip(tensors, self.slots, strict=True)])

    def settle(self, *, weights: bool) -> None:
        """After a verb: write back weights, or else states, of tensors whose matrices are no views."""
        if not self._has_views and self._whole is not None:
            (slot,), whole = self.slots, self._whole
            if weights:
                olds = [slot.param, *([] if slot.remainder is None else [slot.remainder])]
                news = [whole.params, *([] if whole.remainders is None else [whole.remainders])]
            else:
                olds, news = list(slot.states), whole.states
            for old, new in zip(olds, news, strict=True):
                store(old, new.tensors[0])
        if weights or not self._has_views:
            # Until the next verb all may change.
            self._forget()
