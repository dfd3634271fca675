"""The three verbs of the torch backend."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ...formulas.rotation import KEEP, LINEAR, PRECISE, coefficients, is_nearly_parallel, orthogonal_square
from ...formulas.tables import Coefficient, Column, Count, Flag, Hyper
from ...step.backend import Backend
from ...step.batch import Batch
from .arithmetic import Pool
from .base import Base
from .pieces import Piece, Run
from .runs import TILE, WINDOW, Window, runs_of
from .sums import row_sums

POOL = Pool(TILE)

_FLAGS = torch.tensor([Flag.ROTATES, Flag.CURRENT, Flag.WAITS, Flag.PART], device="cpu")


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

    def step(self, batch: Batch) -> None:
        """In windows: what is rotated soon after it was measured is still in the cache, and so is its base step."""
        if batch.dots.device.type != "cpu":
            super().step(batch)
            return
        batch.dots.zero_()
        batch.coefficients.zero_()
        runs = runs_of(batch)
        runs.refresh()
        for window in runs.windows():
            self._measure(batch, window.runs, WINDOW)
            self._coefficients(batch, window)
            self._rotate(batch, window.runs)

    def measure(self, batch: Batch) -> None:
        batch.dots.zero_()
        runs = runs_of(batch)
        runs.refresh()
        self._measure(batch, runs, 0)

    def _measure(self, batch: Batch, runs: Iterable[Run], kept: int) -> None:
        """``kept``: of how many elements to keep weights and steps as they were made, at most."""
        if batch.taken is not None and batch.taken.device.type == "cpu" and not batch.taken:
            return
        bad = batch.counts[:, Count.NON_FINITE]
        for run in runs:
            base, pieces = Base(batch, run, POOL), run.pieces()
            for number, piece in enumerate(pieces):
                # The last ones are rotated first.
                keep = (len(pieces) - number) * TILE <= kept
                if isinstance(piece.rows, slice):
                    batch.dots[piece.rows] += base.measure(piece, bad[piece.rows], keep)
                    continue
                found = torch.zeros_like(piece.rows)
                batch.dots.index_copy_(0, piece.rows, base.measure(piece, found, keep))
                if not piece.is_clean:
                    bad.index_add_(0, piece.rows, found)
            run.settle(weights=False)

    def coefficients(self, batch: Batch) -> None:
        self._coefficients(batch, runs_of(batch).whole)

    def _coefficients(self, batch: Batch, window: Window) -> None:
        rows = window.rows
        tensors = batch.tensors[batch.layer_tensors[rows]]
        hypers = batch.hypers[tensors[:, Column.HYPER]]
        bits = tensors[:, Column.FLAGS].unsqueeze(1) & _FLAGS.to(tensors.device)
        rotates, current, waits, is_part = (bits != 0).unbind(1)
        rule, noise = tensors[:, Column.RULE], hypers[:, Hyper.NOISE]
        has_grad = tensors[:, Column.GRAD] != 0
        lr, weight_decay = hypers[:, Hyper.LR], hypers[:, Hyper.WEIGHT_DECAY]
        radii = [slot.radius for slot in window.slots if slot.radius is not None]
        n2, d, q = batch.dots[rows].unbind(1)
        before = torch.zeros_like(n2)
        if radii:
            before.masked_scatter_(rotates, torch.cat(radii).to(before.device))
        sigma2 = orthogonal_square(n2, d, q)
        if sigma2.device.type == "cpu":
            # Elsewhere, to know whether there is anything to measure again, the host would have to wait.
            sigma2 = self._measured_again(batch, window, sigma2, rotates & ~is_part & is_nearly_parallel(sigma2, q))
        flags = rotates, current, waits
        *abc, mode, after = coefficients(n2, d, q, sigma2, lr, before, weight_decay, *flags, rule, noise)
        mode = torch.where(has_grad, mode, KEEP)
        batch.coefficients[rows] = torch.stack([*abc, mode], 1)
        if radii:
            parts = after.split([slot.layers for slot in window.slots])
            values = [part for part, slot in zip(parts, window.slots, strict=True) if slot.radius is not None]
            torch._foreach_copy_(radii, values)
        stuck = rotates & has_grad & (lr > 0) & (mode == KEEP)
        finite = n2 - n2 == 0
        batch.counts[rows, Count.NO_DIRECTION] += stuck & finite
        batch.counts[rows, Count.BROKEN] += rotates & has_grad & ~finite

    def _measured_again(self, batch: Batch, window: Window, sigma2: Tensor, nearly_parallel: Tensor) -> Tensor:
        """sigma^2 of all layers; of these from the elements, as the sum of (u - c*w)^2."""
        if not bool(nearly_parallel.any()):
            return sigma2
        asked = torch.zeros(batch.n_layers, dtype=torch.bool)
        asked[window.rows] = nearly_parallel
        c = (batch.dots[:, 1] / batch.dots[:, 0]).unsqueeze(1)
        sums = torch.zeros(batch.n_layers, dtype=torch.float64)
        for run in window.runs:
            base = Base(batch, run, POOL)
            for piece in run.pieces():
                if bool(asked[piece.rows].any()):
                    step, weight = base.again(piece)
                    difference = step.tensor.double() - c[piece.rows] * weight.tensor.double()
                    sums[piece.rows] += row_sums(difference * difference)
        return torch.where(nearly_parallel, sums[window.rows], sigma2)

    def rotate(self, batch: Batch) -> None:
        self._rotate(batch, runs_of(batch))

    def _rotate(self, batch: Batch, runs: Iterable[Run]) -> None:
        for run in runs:
            base = Base(batch, run, POOL)
            # What measure saw last may still be in the cache.
            for piece in reversed(run.pieces()):
                self._rotate_piece(base, piece, batch.coefficients[piece.rows])
                piece.kept = None
            run.settle(weights=True)

    def _rotate_piece(self, base: Base, piece: Piece, table: Tensor) -> None:
        """Apply these coefficients (layers, 4) to the weights of a piece."""
        modes = table[:, Coefficient.MODE :]
        # On the CPU the modes can be read; elsewhere that would make the host wait, so every form is computed.
        present = set(modes.flatten().tolist()) if modes.device.type == "cpu" else {KEEP, LINEAR, PRECISE}
        if present == {KEEP}:
            return
        step, weight = base.again(piece)
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
