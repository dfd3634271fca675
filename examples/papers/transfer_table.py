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

    def losses(self, setting: Setting) -> dict[float, dict[int, float]]:
        """By power of 2 in ascending order, then by seed."""
        found: dict[float, dict[int, float]] = {}
        for row in self.rows.values():
            if row.key() == row_of(setting, row.lr, row.seed).key():
                found.setdefault(row.lr, {})[row.seed] = row.held_out
        return dict(sorted(found.items()))

    def common(self, setting: Setting, *also: float) -> dict[float, dict[int, float]]:
        """As ``losses``: the first n seeds of the rates that have them all.

        n is the largest for which the best of these has both its neighbours, and ``also`` are there; 1 if none is.
        """
        found = self.losses(setting)
        for count in range(max((len(each) for each in found.values()), default=1), 0, -1):
            seeds = range(count)
            same = {
                power: {seed: by_seed[seed] for seed in seeds}
                for power, by_seed in found.items()
                if set(seeds) <= set(by_seed)
            }
            if same and {least(same) - 1, least(same) + 1, *also} <= set(same):
                break
        return same if found else {}

    def best(self, setting: Setting) -> float | None:
        """The power with the least mean loss; None: nothing trained yet."""
        found = self.common(setting)
        return least(found) if found else None


def least(losses: dict[float, dict[int, float]]) -> float:
    """The power with the least mean loss."""
    return min(losses, key=lambda power: (fmean(losses[power].values()), power))


@dataclass(frozen=True)
class Transfer:
    """What a setting has, and what the first setting's best rate costs there: ``regret`` by seed, in nats."""

    setting: Setting
    best: float
    at_best: list[float]
    regret: list[float]
    #: Both neighbours of the best rate were tried.
    inside: bool


def transfer(table: Table, setting: Setting, reference: float) -> Transfer | None:
    """None where nothing is trained at the reference's rate."""
    found = table.common(setting, reference)
    if reference not in found:
        return None
    best = least(found)
    at_best, taken = found[best], found[reference]
    return Transfer(
        setting,
        best,
        [at_best[seed] for seed in sorted(at_best)],
        [taken[seed] - at_best[seed] for seed in sorted(at_best)],
        {best - 1, best + 1} <= set(found),
    )
