"""Does the best learning rate of a small model serve a large one? A character GPT under seven optimizers.

    python examples/papers/transfer.py --seeds 3             # what the CSV lacks (hours), tables and figures
    python examples/papers/transfer.py --only width,horizon  # some of the studies
    python examples/papers/transfer.py --report              # train nothing: tables and figures of what the CSV has
    python examples/papers/transfer.py --quick               # seconds; fails where AdamW's rate transfers better

Every study changes one thing: the width, the number of steps, the depth, the scale of the initial weights, or the width
without warm-up. For each of its settings and each optimizer it tries powers of 2 as rates, outward from a start, until
the best by mean held-out loss has worse ones on both sides. Then the best rate of the study's first setting is taken to
all the others: the loss that it costs there is the regret. Every training is a row of a CSV and is never done twice, so
a study goes on where it was interrupted. On one thread.

Needs the extra "demo" (matplotlib, rich).
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transfer_report import STUDIES, report
from transfer_table import Table
from transfer_training import OPTIMIZERS, Setting, train

from layca_fast.commands.demo.training import one_cpu_thread

RESULTS = Path(__file__).parent / "results" / "transfer.csv"

#: Where the figures go, and the pages whose tables are written anew.
FIGURES = Path(__file__).parents[2] / "docs"
PAGES = [FIGURES.parent / "README.md", FIGURES / "learning_rate.md", FIGURES / "large_models.md"]

#: Beyond these powers of 2 the search does not go.
LARGEST, SMALLEST = 2, -16

#: Where the search begins: Muon's directions have larger rates.
START = {name: -4 if name.startswith("muon") else -6 for name in OPTIMIZERS}


class Studies:
    """Trains what the table lacks."""

    def __init__(self, table: Table, seeds: Sequence[int], progress: Progress) -> None:
        self.table, self.seeds, self.progress = table, seeds, progress

    def need(self, setting: Setting, power: float) -> float:
        """Mean loss over the seeds, whose rows the table has afterwards."""
        for seed in self.seeds:
            if self.table.loss(setting, power, seed) is None:
                label = OPTIMIZERS[setting.optimizer]
                self.progress.update(self.bar, description=f"{label}, width {setting.width}, 2^{power:g}, seed {seed}")
                self.table.add(train(setting, power, seed))
        return self.table.mean(setting, power, self.seeds)

    def search(self, setting: Setting, begin: float) -> float:
        """The best power of 2: both its neighbours are worse, or beyond what is tried."""
        means: dict[float, float] = {}
        wanted = {begin}
        while wanted:
            means |= {power: self.need(setting, power) for power in sorted(wanted)}
            best = min(means, key=lambda power: (means[power], power))
            wanted = {power for power in (best - 1, best + 1) if SMALLEST <= power <= LARGEST} - set(means)
        return best

    def run(self, name: str, optimizers: Iterable[str]) -> None:
        """All settings of a study, and what the first one's best rate gives at the others."""
        names = list(optimizers)
        self.bar = self.progress.add_task(name, total=len(names) * len(STUDIES[name].changes))
        for optimizer in names:
            settings = STUDIES[name].settings(optimizer)
            reference, tried = float(START[optimizer]), set[float]()
            for setting in settings:
                known = self.table.best(setting)
                best = self.search(setting, reference if known is None else known)
                if setting is settings[0]:
                    reference = best
                self.need(setting, reference)
                tried |= {best - 1, best, best + 1, reference}
                self.progress.advance(self.bar)
            if STUDIES[name].even:
                for setting in settings:
                    for power in np.arange(min(tried), max(tried) + 1):
                        self.need(setting, float(power))
        self.progress.remove_task(self.bar)


#: A run so small that the check takes seconds, from a small model to a large one, and the powers of 2 that it tries.
QUICK = {"steps": 80, "batch": 4, "context": 32}
SMALL, LARGE = 16, 96
QUICK_POWERS = {"adamw": (-7, -5, -3), "muon-layca": (-5, -3, -1)}


def quick() -> None:
    """Raises SystemExit unless the small model's best rate costs AdamW at least twice what it costs Layca."""
    regrets = {}
    for name, powers in QUICK_POWERS.items():
        losses = {
            width: {power: train(Setting(name, width, **QUICK), power, seed=0).held_out for power in powers}
            for width in (SMALL, LARGE)
        }
        small, large = (min(powers, key=losses[width].__getitem__) for width in (SMALL, LARGE))
        regrets[name] = losses[LARGE][small] - losses[LARGE][large]
        rates = f"best 2^{small} at width {SMALL}, 2^{large} at width {LARGE}"
        print(f"{OPTIMIZERS[name]}: {rates}; regret {regrets[name]:.3f} nats")
    if not regrets["adamw"] > max(0.1, 2 * regrets["muon-layca"]):
        raise SystemExit(f"the best rate of width {SMALL} serves AdamW as well at width {LARGE}: regrets {regrets}")
    print("the small model's best rate costs AdamW more than twice what it costs Layca along Muon's direction")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing; print the tables, draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STUDIES), help="studies, separated by commas (default: %(default)s)")
    parser.add_argument("--optimizer", default=",".join(OPTIMIZERS), help="some of %(default)s (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV (default: in examples/papers/results)")
    parser.add_argument(
        "--figures",
        type=Path,
        default=FIGURES,
        help="folder of the figures (default: docs, whose tables it then writes, too)",
    )
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--quick", action="store_true", help="a small check of the direction")
    options = parser.parse_args(arguments)
    studies, optimizers = options.only.split(","), options.optimizer.split(",")
    for option, names, known in (("only", studies, STUDIES), ("optimizer", optimizers, OPTIMIZERS)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"--{option} {','.join(unknown)}: choose from {', '.join(known)}")
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: give 1 or more")
    with one_cpu_thread():
        if options.quick:
            quick()
            return
        table = Table(options.out)
        if not options.report:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns) as progress:
                for name in studies:
                    Studies(table, range(options.seeds), progress).run(name, optimizers)
        report(table, studies, options.figures, PAGES if options.figures == FIGURES else [])


if __name__ == "__main__":
    main()
