"""The trainings that transfer.py has: a CSV, and what follows from its rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from transfer_training import PYTHON, Row, Setting

# transfer_training has put the folder of examples on the path.
from result_rows import append, read  # isort: skip


class Table:
    """Losses by setting, power of 2 and seed. Rows of another Python, whose text differs, are not read."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[Setting, dict[float, dict[int, float]]] = {}
        for row in read(path, Row) if path is not None else []:
            self._note(row)

    def _note(self, row: Row) -> None:
        if row.python == PYTHON:
            self.found.setdefault(row.setting(), {}).setdefault(row.lr, {})[row.seed] = row.held_out

    def add(self, row: Row) -> None:
        """To the file, too."""
        self._note(row)
        if self.path is not None:
            append(self.path, row)

    def loss(self, setting: Setting, power: float, seed: int) -> float | None:
        """None: not trained yet."""
        return self.found.get(setting, {}).get(power, {}).get(seed)

    def mean(self, setting: Setting, power: float, seeds: Sequence[int]) -> float:
        """Over seeds, all of which the table has; infinite where one diverged."""
        losses = [self.loss(setting, power, seed) for seed in seeds]
        return fmean(math.inf if loss is None else loss for loss in losses)

    def losses(self, setting: Setting, seeds: int) -> dict[float, list[float]]:
        """By power of 2 in ascending order: those of the first ``seeds`` seeds, of the rates that have them all."""
        wanted = range(seeds)
        return {
            power: [by_seed[seed] for seed in wanted]
            for power, by_seed in sorted(self.found.get(setting, {}).items())
            if set(wanted) <= set(by_seed)
        }

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
    most = max((len(by_seed) for each in table.found.values() for by_seed in each.values()), default=1)
    for seeds in range(most, 0, -1):
        found = [table.losses(setting, seeds) for setting in settings]
        if not found[0]:
            continue
        taken = least(found[0])
        outcomes = [Transfer(losses, taken) if taken in losses else None for losses in found]
        if all(outcome is not None and outcome.inside for outcome in outcomes):
            return list(outcomes)
    return outcomes if found[0] else [None] * len(settings)
