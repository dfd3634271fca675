"""The three verbs of the torch backend."""

import torch
from torch import Tensor

from ...formulas.rotation import KEEP, LINEAR, PRECISE, coefficients, is_nearly_parallel, orthogonal_square
from ...formulas.tables import Coefficient, Column, Count, Flag, Hyper
from ...step.backend import Backend
from ...step.batch import Batch
from .base import Base
from .pieces import Piece, copy_all
from .run import Run
from .runs import TILE, Runs, Window, can_look, runs_of
from .sums import row_sums


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
        """In windows: what is rotated soon after it was measured is still in the cache."""
        if not can_look(batch):
            super().step(batch)
            return
        batch.dots.zero_()
        batch.coefficients.zero_()
        runs = runs_of(batch)
        runs.refresh(batch)
        try:
            for window in runs.windows(batch):
                runs.window = window
                self.measure(batch)
                self.coefficients(batch)
                self.rotate(batch)
        except BaseException:
            runs.let_go()
            raise
        finally:
            runs.window = None

    def measure(self, batch: Batch) -> None:
        runs = runs_of(batch)
        if runs.window is None:
            batch.dots.zero_()
            runs.refresh(batch)
        if batch.taken is not None and can_look(batch) and not batch.taken:
            return
        bad = batch.counts[:, Count.NON_FINITE]
        for run in runs.current(batch).runs:
            base = Base(batch, run, runs.pool, can_look(batch))
            for piece in run.pieces():
                if isinstance(piece.rows, slice):
                    batch.dots[piece.rows].add_(base.measure(piece, bad[piece.rows]))
                    continue
                found = torch.zeros_like(piece.rows)
                batch.dots.index_copy_(0, piece.rows, base.measure(piece, found))
                bad.index_add_(0, piece.rows, found)
            run.settle(weights=False)

    def coefficients(self, batch: Batch) -> None:
        window = runs_of(batch).current(batch)
        rows = window.rows
        tensors = batch.tensors[batch.layer_tensors[rows]]
        hypers = batch.hypers[tensors[:, Column.HYPER]]
        rotates = tensors[:, Column.FLAGS] & Flag.ROTATES != 0
        current = tensors[:, Column.FLAGS] & Flag.CURRENT != 0
        waits = tensors[:, Column.FLAGS] & Flag.WAITS != 0
        here = tensors[:, Column.FLAGS] & Flag.PART == 0
        rule, noise = tensors[:, Column.RULE], hypers[:, Hyper.NOISE]
        has_grad = tensors[:, Column.GRAD] != 0
        lr, weight_decay = hypers[:, Hyper.LR], hypers[:, Hyper.WEIGHT_DECAY]
        before = torch.cat([radius.to(batch.dots.device) for radius in window.radii])
        n2, d, q = batch.dots[rows].unbind(1)
        sigma2 = orthogonal_square(n2, d, q)
        if can_look(batch):
            # Elsewhere, to know whether there is anything to measure again, the host would have to wait.
            sigma2 = self._measured_again(batch, window, sigma2, rotates & here & is_nearly_parallel(sigma2, q))
        flags = rotates, current, waits
        *abc, mode, after = coefficients(n2, d, q, sigma2, lr, before, weight_decay, *flags, rule, noise)
        mode = torch.where(has_grad, mode, KEEP)
        batch.coefficients[rows] = torch.stack([*abc, mode], 1)
        parts = after.split(window.layers)
        copy_all([window.radii[i] for i in window.turning], [parts[i] for i in window.turning])
        stuck = rotates & has_grad & (lr > 0) & (mode == KEEP)
        finite = n2 - n2 == 0
        batch.counts[rows, Count.NO_DIRECTION] += stuck & finite
        batch.counts[rows, Count.BROKEN] += rotates & has_grad & ~finite

    def _measured_again(self, batch: Batch, window: Window, sigma2: Tensor, nearly_parallel: Tensor) -> Tensor:
        """sigma^2 of all layers; of these, where they have a gradient, from the elements: the sum of (u - c*w)^2."""
        if not bool(nearly_parallel.any()):
            return sigma2
        runs = runs_of(batch)
        asked = torch.zeros_like(batch.dots[:, 0], dtype=torch.bool)
        asked[window.rows] = nearly_parallel
        c = (batch.dots[:, 1] / batch.dots[:, 0]).unsqueeze(1)
        sums, found = torch.zeros_like(batch.dots[:, 0]), torch.zeros_like(asked)
        for run in window.runs:
            base = Base(batch, run, runs.pool, looks=True)
            for piece in run.pieces():
                if bool(asked[piece.rows].any()):
                    step, weight = base.again(piece), base.weight(piece)
                    difference = step.tensor.double() - c[piece.rows] * weight.tensor.double()
                    sums[piece.rows] += row_sums(difference * difference)
                    found[piece.rows] = True
        return torch.where(nearly_parallel & found[window.rows], sums[window.rows], sigma2)

    def rotate(self, batch: Batch) -> None:
        runs = runs_of(batch)
        for run in runs.current(batch).runs:
            self._rotate_run(batch, run, runs)

    def _rotate_run(self, batch: Batch, run: Run, runs: Runs) -> None:
        base = Base(batch, run, runs.pool, can_look(batch))
        # What measure saw last may still be in the cache.
        for piece in reversed(run.pieces()):
            table = batch.coefficients[piece.rows]
            modes = table[:, Coefficient.MODE]
            # Where the modes cannot be read without waiting, every form is computed.
            present = set(modes.tolist()) if can_look(batch) else {KEEP, LINEAR, PRECISE}
            if present != {KEEP}:
                self._rotate_piece(base, piece, table, present, runs)
        run.settle(weights=True)

    def _rotate_piece(self, base: Base, piece: Piece, table: Tensor, present: set[float], runs: Runs) -> None:
        """Apply these coefficients (layers, 4), of the modes that are ``present``, to the weights of a piece."""
        step, weight = base.again(piece), base.weight(piece)
        u, w = step.tensor, weight.tensor
        a, b, c, modes = table.unsqueeze(2).unbind(1)
        if present == {LINEAR}:
            across = step * b.to(w.dtype)
            # In place: of the weights themselves, or of what was made of them. Nothing can fail between the two.
            rotated = w.mul_(a.to(w.dtype)).add_(across.tensor)
        else:
            rotated = w
            if LINEAR in present:
                linear = a.to(w.dtype) * w + b.to(w.dtype) * u
                rotated = torch.where(modes == LINEAR, linear, rotated)
            if PRECISE in present:
                precise = a * w.double() + b * (u.double() - c * w.double())
                rotated = torch.where(modes == PRECISE, precise.to(w.dtype), rotated)
        piece.store_weight(rotated, modes == KEEP if KEEP in present else None, runs.pool)


BACKEND = TorchBackend()
