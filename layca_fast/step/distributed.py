"""Sharded layers: the sums over processes that a step needs, one all-reduce per dimension of the mesh that shards.

The layout of what is summed follows from the param groups alone, so it is the same on all processes whichever gradients
they have. A shard without a gradient adds its weights to the norm and takes no part in the step: its base optimizer's
state stays, and its weights are scaled with the layer. A layer without a gradient anywhere has a step of zeros, and so
stays as it is, bit for bit.
"""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..formulas.bases import BASES
from ..state.modes import out_of_inference
from ..state.reduction import Groups, Reduction
from ..state.slot import Slot
from .backend import Backend
from .batch import Batch
from .learned_radius import LearnedRadii, scale_moving
from .unscaling import LossScale

#: What a group says for the shards that take no step: that of plain SGD, which is the gradient, of zeros.
_NO_STEP: Mapping[str, Any] = {"base": "sgd", **BASES["sgd"].options}


class _Still:
    """The slots of a batch that take no step here while their layers turn: shards without elements or gradients.

    ``backend``, which takes any layout, measures their weights beside a step of zeros, and turns them with the layer's
    coefficients.
    """

    def __init__(self, batch: Batch, indices: Sequence[int], backend: Backend) -> None:
        self._backend = backend
        rows = [row for i in indices for row in _rows(batch, i)]
        self.rows = torch.tensor(rows, dtype=torch.int64, device=batch.dots.device)
        slots = [_without_step(batch.slots[i]) for i in indices]
        self.batch = Batch(BASES["sgd"].formula(slots[0].group), slots, backend.tile)
        self._zeros = [torch.zeros_like(slot.param, dtype=batch.compute_dtype) for slot in slots]

    def measure(self, loss_scale: LossScale | None, capturing: bool) -> None:
        self.batch.grads, self.batch.grad_dtype = list(self._zeros), self.batch.compute_dtype
        self.batch.refresh(loss_scale, capturing)
        self._backend.measure(self.batch)

    def turn(self, factors: Tensor | None) -> None:
        """``factors``: of the norms of the layers of the batch, where radii are learned."""
        self._backend.coefficients(self.batch)
        if factors is not None:
            scale_moving(self.batch, factors.index_select(0, self.rows))
        self._backend.rotate(self.batch)
        self.batch.release()


def _rows(batch: Batch, index: int) -> range:
    """The rows of a slot in the tables of layers of its batch."""
    first = batch.first_layers[index]
    return range(first, first + batch.slots[index].layers)


def _without_step(slot: Slot) -> Slot:
    """The slot as one whose step is its gradient; with elements, if it has none: those of a weight that is zero."""
    param, remainder = slot.param, slot.remainder
    if param.numel() == 0:
        param = param.new_zeros(slot.layers, 1)
        remainder = None if remainder is None else remainder.new_zeros(slot.layers, 1)
    group: Mapping[str, Any] = ChainMap(dict(_NO_STEP), slot.group)  # type: ignore[arg-type]
    base = BASES["sgd"]
    return replace(slot, param=param, remainder=remainder, group=group, base=base, states=(), step=None, entry={})


class _Share:
    """A batch in the reduction: where its layers' dots are among those of all, and what it has that stays still."""

    def __init__(self, batch: Batch, rows: Sequence[int], backend: Backend | None) -> None:
        self.batch = batch
        self._backend = backend
        self._rows = torch.tensor(rows, dtype=torch.int64, device=batch.dots.device)
        #: Those without elements; and what does not turn, whose directions are made of whole matrices.
        self._empty = tuple(i for i, s in enumerate(batch.slots) if s.param.numel() == 0 and s.radius is not None)
        self._plain = {i for i, slot in enumerate(batch.slots) if slot.radius is None}
        self._stills: dict[tuple[int, ...], _Still] = {}
        self.still: _Still | None = None

    def measure_still(self, loss_scale: LossScale | None, capturing: bool) -> None:
        """Measure what the kernels leave out, once they have measured."""
        if self._backend is None:
            return
        lacking = [i for i, grad in enumerate(self.batch.grads) if grad is None and i not in self._empty]
        for i in self._plain.intersection(lacking):
            # What a layer that moves by itself has no gradient for stays; kernels leave the dots of before.
            self.batch.dots[_rows(self.batch, i).start : _rows(self.batch, i).stop].zero_()
        indices = (*self._empty, *(i for i in lacking if i not in self._plain))
        if not indices:
            self.still = None
            return
        if indices not in self._stills:
            # Of one pattern of missing gradients only: each takes memory.
            with out_of_inference():
                self._stills = {indices: _Still(self.batch, indices, self._backend)}
        self.still = self._stills[indices]
        self.still.measure(loss_scale, capturing)
        self.batch.dots.index_copy_(0, self.still.rows, self.still.batch.dots)

    def give(self, table: Tensor) -> None:
        rows = self._rows.to(table.device)
        table.index_copy_(0, rows, self.batch.dots.to(table.device))

    def take(self, table: Tensor) -> None:
        if table.device == self.batch.dots.device:
            # Nothing is allocated.
            torch.index_select(table, 0, self._rows, out=self.batch.dots)
        else:
            self.batch.dots.copy_(table.index_select(0, self._rows.to(table.device)))
        if self.still is not None:
            self.still.batch.dots.copy_(self.batch.dots.index_select(0, self.still.rows))


def _places(batch: Batch, firsts: Sequence[int], start: int) -> list[int]:
    """The rows of a batch's layers in the table of all, of which those of its kind begin at ``start``."""
    rows: list[int] = []
    for slot in batch.slots:
        first = start + firsts[slot.number] + slot.piece.first
        rows.extend(range(first, first + slot.layers))
    return rows


class SharedDots:
    """The dots of the layers that other processes have parts of, in batches that hold only such layers.

    ``layout`` has (number of layers here, groups) for each of their tensors, and each slot of ``batches`` the number of
    its tensor in it. ``still`` measures and turns what the kernels leave out. ``learned``:
    the batches whose radii are.
    """

    def __init__(
        self,
        layout: Sequence[tuple[int, Groups]],
        batches: Sequence[Batch],
        still: Backend,
        learned: Mapping[Batch, LearnedRadii],
    ) -> None:
        firsts = list(accumulate((layers for layers, _ in layout), initial=0))
        # Where shards lie on several devices, one that is no CPU.
        devices = sorted({batch.dots.device for batch in batches}, key=lambda device: device.type == "cpu")
        self._learned = [learned.get(batch) for batch in batches]
        radii = [each.batch for each in self._learned if each is not None]
        # Their dots travel with the others.
        self._reduction = Reduction([*layout, *(layout if radii else ())], 3, devices[0])
        self._shares = [_Share(batch, _places(batch, firsts, 0), still) for batch in batches]
        self._radii = [_Share(batch, _places(batch, firsts, firsts[-1]), None) for batch in radii]

    def add_up(self, loss_scale: LossScale | None, capturing: bool) -> None:
        """From the dots of what lies here to those of the whole layers, in place, once every batch is measured."""
        table = self._reduction.table
        for share in (*self._shares, *self._radii):
            share.measure_still(loss_scale, capturing)
            share.give(table)
        self._reduction.run()
        for share in (*self._shares, *self._radii):
            share.take(table)

    def turn_still(self) -> None:
        """Rotate what the kernels leave out."""
        for share, learned in zip(self._shares, self._learned, strict=True):
            if share.still is not None:
                share.still.turn(None if learned is None else learned.all_factors())
                # What is told of the step is then the same on every process.
                share.batch.coefficients.index_copy_(0, share.still.rows, share.still.batch.coefficients)
