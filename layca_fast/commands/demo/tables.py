"""The demo's tables: one base without and with Layca, or all of them and how far they end apart."""

from collections.abc import Sequence
from statistics import mean, stdev

from ...figures.console import print_table
from .training import Contestant, Result, Run, pairs_of


def final_accuracies(runs: Sequence[Run]) -> list[float]:
    """Test accuracy at the end of each run."""
    return [run.accuracy[-1] for run in runs]


def spread_in_points(results: Sequence[Result]) -> float:
    """How far the best and the worst of ``results`` end apart in test accuracy (mean over seeds), in per cent."""
    finals = [mean(final_accuracies(runs)) for _, runs in results]
    return 100 * (max(finals) - min(finals))


def print_pair(title: str, results: Sequence[Result]) -> None:
    """Accuracy and rotation of each of a few optimizers."""
    columns = ["optimizer", "lr", "backend", "test\naccuracy", "mean rotation\n(1 - cos)"]
    print_table(title, columns, [_row(*result) for result in results])


def print_bases(title: str, results: Sequence[Result]) -> None:
    """Accuracies of each base, plain and with Layca in turn in ``results``, and the spread of either over the bases."""
    plain, layca = pairs_of(results)
    rows = [
        [one.base, one.rate, _summary(final_accuracies(before)), two.rate, _summary(final_accuracies(after))]
        for (one, before), (two, after) in zip(plain, layca, strict=True)
    ]
    spreads = [f"{spread_in_points(side):.1f} points" for side in (plain, layca)]
    columns = ["base", "plain\nlr", "plain\ntest accuracy", "Layca\nlr", "Layca\ntest accuracy"]
    print_table(title, columns, [*rows, ["spread", "", spreads[0], "", spreads[1]]])


def _row(racer: Contestant, runs: Sequence[Run]) -> list[str]:
    accuracy = _summary(final_accuracies(runs))
    rotation = _summary([mean(run.rotation[-1]) for run in runs])
    return [racer.name, racer.rate, racer.backend, accuracy, rotation]


def _summary(values: Sequence[float]) -> str:
    middle = f"{mean(values):.3f}"
    return f"{middle} ± {stdev(values):.3f}" if len(values) > 1 else middle
