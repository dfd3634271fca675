"""The search of train_lm.py for the best rate of each optimizer at each width, and the CSV that keeps its trainings."""

import argparse
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from result_rows import append, made_with, read
from torch import distributed

from layca_fast.figures.console import print_table

RESULTS = Path(__file__).parent / "results" / "train_lm.csv"

#: Beyond these powers of 2 the search does not go.
LARGEST, SMALLEST = 0, -14

#: Held-out loss of a training: of an optimizer, at a width and a rate, from a seed.
Train = Callable[[str, int, float, int], float]


@dataclass(frozen=True)
class Row:
    """A training. ``lr`` is a power of 2, ``held_out`` nats per character of the text of this ``python``."""

    optimizer: str
    width: int
    lr: int
    seed: int
    steps: int
    layers: int
    heads: int
    context: int
    batch: int
    precision: str
    embeddings: bool
    head: bool
    python: str
    held_out: float
    date: str = ""
    layca_fast: str = ""
    torch: str = ""

    def key(self) -> tuple[object, ...]:
        """What the outcome follows from."""
        return tuple(asdict(self).values())[:13]


class Search:
    """Trains what the CSV lacks: ``train`` is called on all processes alike, and the first of them writes."""

    def __init__(self, options: argparse.Namespace, train: Train) -> None:
        self.options, self.train = options, train
        self.is_first = distributed.get_rank() == 0
        # What one process finds is what all go by: other machines may not see the file.
        found = [read(options.out, Row) if self.is_first else None]
        distributed.broadcast_object_list(found)
        self.rows = {row.key(): row for row in found[0] or []}

    def loss(self, name: str, width: int, power: int, seed: int) -> float:
        """Of one training, which the CSV has afterwards."""
        options = self.options
        row = Row(
            optimizer=name,
            width=width,
            lr=power,
            seed=seed,
            embeddings=options.rotate_embeddings,
            head=options.rotate_head,
            python=".".join(platform.python_version_tuple()[:2]),
            held_out=math.nan,
            **{each: getattr(options, each) for each in ("steps", "layers", "heads", "context", "batch", "precision")},
        )
        if row.key() not in self.rows:
            loss = self.train(name, width, 2.0**power, seed)
            row = Row(**{**asdict(row), "held_out": float(f"{loss:.6g}"), **made_with()})
            self.rows[row.key()] = row
            if self.is_first:
                append(options.out, row)
                print(f"{name}, width {width}, lr 2^{power}, seed {seed}: {loss:.4f}", flush=True)
        return self.rows[row.key()].held_out

    def best(self, name: str, width: int, start: int) -> tuple[int, list[float]]:
        """The power of 2 with the least mean loss over seeds, and the losses there; one that diverged is the worst."""
        seeds = range(self.options.seed, self.options.seed + self.options.seeds)
        losses: dict[int, list[float]] = {}

        def mean(power: int) -> float:
            value = fmean(losses[power])
            return value if math.isfinite(value) else math.inf

        wanted = {start}
        while wanted:
            for power in sorted(wanted):
                losses[power] = [self.loss(name, width, power, seed) for seed in seeds]
            best = min(sorted(losses), key=mean)
            wanted = {power for power in (best - 1, best + 1) if SMALLEST <= power <= LARGEST} - set(losses)
        return best, losses[best]

    def run(self, rates: Mapping[str, float]) -> None:
        """Search all, beginning at the power of 2 nearest to each of ``rates``; the first process prints the table."""
        lines = []
        for name in self.options.optimizer:
            cells = []
            for width in self.options.width:
                power, losses = self.best(name, width, round(math.log2(rates[name])))
                span = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
                cells.append(f"{fmean(losses):.3f}{span}, 2^{power}")
            lines.append([name, *cells])
        if self.is_first:
            title = f"Held-out loss, and the best power of 2 as lr; {self.options.steps} steps"
            print_table(title, ["optimizer", *(f"width {width}" for width in self.options.width)], lines)
