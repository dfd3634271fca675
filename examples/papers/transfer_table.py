"""The trainings that transfer.py has: a CSV, and what follows from its rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from transfer_training import Row, Setting, row_of

# transfer_training has put the folder of examples on the path.
from result_rows import append, read  # isort: skip


class Table:
    """Rows by what their outcome follows from; those of another Python, whose text differs, are kept and not read."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows = {row.key(): row for row in (read(path, Row) if path is not None else [])}

    def add(self, row: Row) -> None:
        """To the file, too."""
        self.rows[row.key()] = row
        if self.path is not None:
            append(self.path, row)

    def loss(self, setting: Setting, power: float, seed: int) -> float | None:
        """None: not trained yet."""
        row = self.rows.get(row_of(setting, power, seed).key())
        return None if row is None else row.held_out

    def mean(self, setting: Setting, power: float, seeds: Sequence[int]) -> float:
        """Over seeds, all of which the table has; infinite where one diverged."""
        losses = [self.loss(setting, power, seed) for seed in seeds]
        return fmean(math.inf if loss is None else loss for loss in losses)

    def losses(self, setting: Setting, seeds: int) -> dict[float, list[float]]:
        """By power of 2 in ascending order: those of the first ``seeds`` seeds, of the rates that have them all."""
        powers = sorted({row.lr for row in self.rows.values() if row.key() == row_of(setting, row.lr, row.seed).key()})
        found = {power: [self.loss(setting, power, seed) for seed in range(seeds)] for power in powers}
        return {power: [loss for loss in each if loss is not None] for power, each in found.items() if None not in each}

    def best(self, setting: Setting) -> float | None:
        """By the first seed, where to search from; None: nothing trained yet."""
        found = self.losses(setting, 1)
        return least(found) if found else None


def least(losses: dict[float, list[float]]) -> float:
    """The power with the least mean loss; among equals the smallest."""
    return min(losses, key=lambda power: (fmean(losses[power]), power))


@dataclass(frozen=True)
class Transfer:
    """What a setting has at each power of 2, and what the first setting's best rate, ``taken``, gives there.

    ``losses``: a list for each power, one loss a seed. ``inside``: both neighbours of the best were tried.
    """

    losses: dict[float, list[float]]
    taken: float

    @property
    def best(self) -> float:
        return least(self.losses)

    @property
    def inside(self) -> bool:
        return {self.best - 1, self.best + 1} <= set(self.losses)

    @property
    def regret(self) -> list[float]:
        """Of each seed, in nats: may be negative for one, not for their mean."""
        return [taken - best for taken, best in zip(self.losses[self.taken], self.losses[self.best], strict=True)]


def transfers(table: Table, settings: Sequence[Setting]) -> list[Transfer | None]:
    """Of each setting, all from the same seeds: as many as leave every best inside its grid, or one.

    None: nothing trained at the rate that is best for the first.
    """
    most = max((row.seed for row in table.rows.values()), default=0) + 1
    for seeds in range(most, 0, -1):
        found = [table.losses(setting, seeds) for setting in settings]
        if not found[0]:
            continue
        taken = least(found[0])
        outcomes = [Transfer(losses, taken) if taken in losses else None for losses in found]
        if all(outcome is not None and outcome.inside for outcome in outcomes):
            return list(outcomes)
    return outcomes if found[0] else [None] * len(settings)
