"""The three verbs of the torch backend."""

import torch
from torch import Tensor

from ...formulas.rotation import KEEP, LINEAR, PRECISE, coefficients, is_nearly_parallel, orthogonal_square
from ...formulas.tables import Coefficient, Column, Count, Flag, Hyper
from ...step.backend import Backend
from ...step.batch import Batch
from .arithmetic import Pool
from .base import Base
from .pieces import Piece
from .runs import TILE, runs_of
from .sums import row_sums

POOL = Pool(TILE)


class TorchBackend(Backend):
    """Torch operations on stacks of small tensors and blocks of large ones; float64 copies are made block by block."""

    name = "torch"
    tile = TILE
    needs_dense = False
    writes_unseen = False

    def missing(self) -> str | None:
        return None

    def refuses(self, device: torch.device) -> str | None:
        return None

    def measure(self, batch: Batch) -> None:
        batch.dots.zero_()
        runs = runs_of(batch)
        runs.refresh()
        if batch.taken is not None and batch.taken.device.type == "cpu" and not batch.taken:
            return
        bad = batch.counts[:, Count.NON_FINITE]
        for run in runs:
            base = Base(batch, run, POOL)
            for piece in run.pieces():
                if isinstance(piece.rows, slice):
                    batch.dots[piece.rows] += base.measure(piece, bad[piece.rows])
                    continue
                found = torch.zeros_like(piece.rows)
                batch.dots.index_copy_(0, piece.rows, base.measure(piece, found))
                if not piece.is_clean:
                    bad.index_add_(0, piece.rows, found)
            run.settle(weights=False)

    def coefficients(self, batch: Batch) -> None:
        tensors = batch.tensors[batch.layer_tensors]
        hypers = batch.hypers[tensors[:, Column.HYPER]]
        rotates = tensors[:, Column.FLAGS] & Flag.ROTATES != 0
        current = tensors[:, Column.FLAGS] & Flag.CURRENT != 0
        waits = tensors[:, Column.FLAGS] & Flag.WAITS != 0
        here = tensors[:, Column.FLAGS] & Flag.PART == 0
        rule, noise = tensors[:, Column.RULE], hypers[:, Hyper.NOISE]
        has_grad = tensors[:, Column.GRAD] != 0
        lr, weight_decay = hypers[:, Hyper.LR], hypers[:, Hyper.WEIGHT_DECAY]
        radii = [slot.radius for slot in batch.slots if slot.radius is not None]
        before = batch.dots.new_zeros(batch.n_layers)
        if radii:
            before.masked_scatter_(rotates, torch.cat(radii).to(before.device))
        n2, d, q = batch.dots.unbind(1)
        sigma2 = orthogonal_square(n2, d, q)
        if sigma2.device.type == "cpu":
            # Elsewhere, to know whether there is anything to measure again, the host would have to wait.
            self._measure_again(batch, sigma2, rotates & here & is_nearly_parallel(sigma2, q))
        flags = rotates, current, waits
        *abc, mode, after = coefficients(n2, d, q, sigma2, lr, before, weight_decay, *flags, rule, noise)
        mode = torch.where(has_grad, mode, KEEP)
        torch.stack([*abc, mode], 1, out=batch.coefficients)
        if before.device.type != "cpu" or not torch.equal(before, after):
            parts = after.split([slot.layers for slot in batch.slots])
            values = [part for part, slot in zip(parts, batch.slots, strict=True) if slot.radius is not None]
            torch._foreach_copy_(radii, values)
        stuck = rotates & has_grad & (lr > 0) & (mode == KEEP)
        finite = n2 - n2 == 0
        batch.counts[:, Count.NO_DIRECTION] += stuck & finite
        batch.counts[:, Count.BROKEN] += rotates & has_grad & ~finite

    def _measure_again(self, batch: Batch, sigma2: Tensor, nearly_parallel: Tensor) -> None:
        """Take these layers' sigma^2 from the elements, as the sum of (u - c*w)^2, in place."""
        if not bool(nearly_parallel.any()):
            return
        c = (batch.dots[:, 1] / batch.dots[:, 0]).unsqueeze(1)
        sums = torch.zeros_like(sigma2)
        for run in runs_of(batch):
            base = Base(batch, run, POOL)
            for piece in run.pieces():
                if bool(nearly_parallel[piece.rows].any()):
                    step, weight = base.step_again(piece), base.weight(piece)
                    difference = step.tensor.double() - c[piece.rows] * weight.tensor.double()
                    sums[piece.rows] += row_sums(difference * difference)
        sigma2.copy_(torch.where(nearly_parallel, sums, sigma2))

    def rotate(self, batch: Batch) -> None:
        for run in runs_of(batch):
            base = Base(batch, run, POOL)
            # What measure saw last may still be in the cache.
            for piece in reversed(run.pieces()):
                self._rotate(base, piece, batch.coefficients[piece.rows])
            run.settle(weights=True)

    def _rotate(self, base: Base, piece: Piece, table: Tensor) -> None:
        """Apply these coefficients (layers, 4) to the weights of a piece."""
        modes = table[:, Coefficient.MODE :]
        # On the CPU the modes can be read; elsewhere that would make the host wait, so every form is computed.
        present = set(modes.flatten().tolist()) if modes.device.type == "cpu" else {KEEP, LINEAR, PRECISE}
        if present == {KEEP}:
            return
        step, weight = base.step_again(piece), base.weight(piece)
        u, w = step.tensor, weight.tensor
        a, b, c, _ = table.unsqueeze(2).unbind(1)
        if present == {LINEAR}:
            # In place: of the weights themselves, or of what was made of them.
            rotated = w.mul_(a.to(w.dtype)).addcmul_(u, b.to(w.dtype))
        else:
            rotated = w
            if LINEAR in present:
                linear = (a.to(w.dtype) * w).addcmul_(u, b.to(w.dtype))
                rotated = torch.where(modes == LINEAR, linear, rotated)
            if PRECISE in present:
                precise = a * w.double() + b * (u.double() - c * w.double())
                rotated = torch.where(modes == PRECISE, precise.to(w.dtype), rotated)
        piece.store_weight(rotated, modes == KEEP if KEEP in present else None, POOL)


BACKEND = TorchBackend()
