"""The rows that fixed_norm.py trains, and the CSV that keeps them."""

import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean

from norm_tasks import Task
from result_rows import append, made_with, read


@dataclass(frozen=True)
class Row:
    """A training. ``lr`` and ``others_lr`` are powers of 3; ``validation`` and ``test`` are of the task's metric.

    ``norms``: of all matrices at the end, as multiples of those at the start, in the model's order.
    """

    task: str
    optimizer: str
    lr: int
    others_lr: int
    seed: int
    steps: int
    validation: float
    validation_loss: float
    test: float
    test_loss: float
    train_loss: float
    norms: str
    date: str = ""
    layca_fast: str = ""
    torch: str = ""
    transformers: str = ""
    python: str = ""

    def key(self) -> tuple[object, ...]:
        return self.task, self.optimizer, self.lr, self.others_lr, self.seed, self.steps

    def growth(self) -> list[float]:
        """``norms`` as numbers."""
        return [float(factor) for factor in self.norms.split()]


def versions() -> dict[str, str]:
    """Columns that say when and with what."""
    try:
        transformers = version("transformers")
    except PackageNotFoundError:
        transformers = ""
    return {**made_with(), "python": platform.python_version(), "transformers": transformers}


class Table:
    """The rows that a CSV has, to which new ones are appended as they come."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, [] if path is None else read(path, Row)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            append(self.path, row)

    def of(
        self, task: Task, optimizer: str, others: int | None = None, seeds: Iterable[int] | None = None
    ) -> list[Row]:
        """Those of an optimizer on a task."""
        return [
            row
            for row in self.rows
            if (row.task, row.optimizer, row.steps) == (task.name, optimizer, task.steps)
            and others in (None, row.others_lr)
            and (seeds is None or row.seed in seeds)
        ]


def best_power(rows: Iterable[Row]) -> int:
    """The rate with the best mean over seeds on validation data; a diverged training is the worst."""

    def mean(lr: int) -> tuple[float, float]:
        mine = [row for row in rows if row.lr == lr]
        quality = fmean(row.validation for row in mine), -fmean(row.validation_loss for row in mine)
        return quality if all(map(math.isfinite, quality)) else (-math.inf, -math.inf)

    rows = list(rows)
    return max({row.lr for row in rows}, key=mean)
