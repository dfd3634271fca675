"""What the programs of this folder share: command line, seeds, progress, a CSV that is gone on with, one figure.

Each program makes a :class:`Study` of one finding: what to train (cases), what to note of it (numbers), how the page
tells it (a table and a figure), and in which direction it went (a check). ``python examples/papers/write_page.py``
writes the tables of docs/papers.md from the CSVs.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from layca_fast.commands.demo.training import one_cpu_thread
from layca_fast.figures.console import print_table

sys.path.append(str(Path(__file__).parents[1]))
from result_rows import made_with

HERE = Path(__file__).parent
FIGURES = HERE.parents[1] / "docs" / "papers"

#: What is trained: names of factors and their values, which become columns of the CSV.
Case = Mapping[str, str | int | float]

#: What is noted of it: the quantity, where (an epoch, a layer, a step; 0 where there is one number), and its value.
Number = tuple[str, float, float]

#: A table: its columns and its rows.
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


class Numbers:
    """The numbers of some trainings: ``frame`` has a row each, with the factors, seed, quantity, at and value."""

    def __init__(self, frame: pandas.DataFrame) -> None:
        self.frame = frame

    def of(self, quantity: str | None = None, **factors: Any) -> "Numbers":
        """Those of a quantity and of these factors (``at`` and ``seed`` may be among them)."""
        frame = self.frame if quantity is None else self.frame[self.frame["quantity"] == quantity]
        for name, value in factors.items():
            frame = frame[frame[name] == value]
        return Numbers(frame)

    def values(self) -> list[float]:
        """As they come."""
        return [float(value) for value in self.frame["value"]]

    def by_seed(self) -> pandas.DataFrame:
        """A column for each seed, a row for each ``at``."""
        return self.frame.pivot(index="at", columns="seed", values="value").sort_index()

    def mean(self) -> float:
        """Over all of them; NaN without any."""
        return float(self.frame["value"].mean())

    def last(self) -> "Numbers":
        """Those at the largest ``at``."""
        return Numbers(self.frame[self.frame["at"] == self.frame["at"].max()])

    def span(self, digits: int = 3) -> str:
        """Mean and range, for a table."""
        values = self.values()
        return f"{self.mean():.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


@dataclass(frozen=True)
class Study:
    """One finding.

    ``cases``: what is to be trained, given what has been: it is asked again until nothing is missing.
    ``measure``: trains a case under a seed and notes numbers; in the scale of ``--quick`` where the last is true.
    ``quick``: the cases of ``--quick``. ``table``: what the page shows. ``draw``: the figure, to a path.
    ``check``: raises AssertionError where the direction is not what the page tells. It holds for ``--quick``, too.
    ``results`` and ``figures``: folders. ``seeds``: how many unless the command line says otherwise.
    """

    name: str
    doc: str
    cases: Callable[[Numbers], Sequence[Case]]
    measure: Callable[[Case, int, bool], Iterable[Number]]
    quick: Sequence[Case]
    table: Callable[[Numbers], Table]
    draw: Callable[[Path, Numbers], None]
    check: Callable[[Numbers], None]
    results: Path = field(default=HERE / "results")
    figures: Path = field(default=FIGURES)
    seeds: int = 3

    @property
    def path(self) -> Path:
        """The CSV."""
        return self.results / f"{self.name}.csv"

    def read(self, path: Path | None = None) -> Numbers:
        """What the CSV has."""
        path = path or self.path
        return Numbers(pandas.read_csv(path) if path.exists() else pandas.DataFrame())

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Train what is missing, print the table and draw the figure."""
        parser = argparse.ArgumentParser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--seeds", type=int, default=self.seeds, help="how many (default: %(default)s)")
        parser.add_argument("--quick", action="store_true", help="seconds, smaller, with a check; writes nothing")
        parser.add_argument("--out", type=Path, default=self.path, help="the CSV (default: that of its name)")
        parser.add_argument("--figure", type=Path, default=self.figures / f"{self.name}.png", help="default: in docs")
        options = parser.parse_args(arguments)
        if options.seeds < 1:
            parser.error(f"--seeds {options.seeds}: it takes one at least")
        with one_cpu_thread():
            found = self.run_quickly() if options.quick else self.complete(range(options.seeds), options.out)
        print_table(self.name, *self.table(found))
        self.check(found)
        if not options.quick:
            options.figure.parent.mkdir(parents=True, exist_ok=True)
            self.draw(options.figure, found)
            print(f"figure: {options.figure}")

    def run_quickly(self) -> Numbers:
        """The cases of ``--quick``, one seed."""
        with bar(self.name) as progress:
            rows = [row for case in progress(self.quick) for row in self._rows(case, 0, True)]
        return Numbers(pandas.DataFrame(rows))

    def complete(self, seeds: Iterable[int], path: Path) -> Numbers:
        """The CSV, with what it lacked of these seeds; each training is appended as it ends."""
        found, wanted = self.read(path), list(seeds)
        while missing := self._missing(found, wanted):
            with bar(self.name) as progress:
                for case, seed in progress(missing):
                    rows = pandas.DataFrame(self._rows(case, seed, False))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    rows.to_csv(path, mode="a", header=not path.exists(), index=False, lineterminator="\n")
                    found = Numbers(pandas.concat([found.frame, rows]))
            # As they are read, so that a run that went on is the run that did not.
            found = self.read(path)
        return Numbers(found.frame[found.frame["seed"].isin(wanted)])

    def _missing(self, found: Numbers, seeds: Sequence[int]) -> list[tuple[Case, int]]:
        cases, have = self.cases(found), set()
        if len(found.frame):
            names = [*cases[0], "seed"]
            have = set(found.frame[names].drop_duplicates().itertuples(index=False, name=None))
        wanted = {(*case.values(), seed): (case, seed) for case in cases for seed in seeds}
        return [each for key, each in wanted.items() if key not in have]

    def _rows(self, case: Case, seed: int, quick: bool) -> list[dict[str, Any]]:
        torch.manual_seed(seed)
        with_what = made_with()
        return [
            {**case, "seed": seed, "quantity": quantity, "at": float(at), "value": float(f"{value:.6g}"), **with_what}
            for quantity, at, value in self.measure(case, seed, quick)
        ]


@contextmanager
def bar(name: str) -> Any:
    """A bar over a sequence, with its present element beside it."""
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns) as progress:

        def over(sequence: Sequence[Any]) -> Iterable[Any]:
            task = progress.add_task(name, total=len(sequence), now="")
            for each in sequence:
                progress.update(task, now=_told(each))
                yield each
                progress.advance(task)

        yield over


def best_rate(numbers: Numbers, quantity: str = "validation accuracy", *, rate: str = "lr") -> float:
    """The rate with the best mean of a quantity over seeds: a diverged training (NaN) is the worst."""
    means = numbers.of(quantity).frame.groupby(rate)["value"].agg(lambda values: values.mean(skipna=False))
    return float(means.fillna(-float("inf")).idxmax())


def widened(numbers: Numbers, start: Sequence[int], *, most: int = 12) -> list[int]:
    """Powers to try: ``start``, and one more at an end for as long as the best stands there."""
    powers = sorted(start)
    while len(numbers.frame) and set(powers) <= set(numbers.frame["lr"]) and len(powers) < most:
        best = best_rate(Numbers(numbers.frame[numbers.frame["lr"].isin(powers)]))
        more = [power for power in (best - 1, best + 1) if power not in powers]
        if not more:
            break
        powers = sorted([*powers, *(int(power) for power in more)])
    return powers


def _told(each: Any) -> str:
    """A case, or a case with a seed, in short."""
    case, seed = each if isinstance(each, tuple) else (each, 0)
    return f"{' '.join(map(str, case.values()))}, seed {seed}"
