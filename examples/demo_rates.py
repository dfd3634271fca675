"""The rates of ``python -m layca_fast demo``, chosen on validation digits: five bases, plain and with Layca.

    python examples/demo_rates.py --seeds 1                              # a quarter of an hour on one core
    python examples/papers/write_page.py --page docs/demo.md             # writes the table of that page

The demo's network and training, on its 1,000 digits, judged by 1,000 others that are not in the demo's test. Rates are
powers of 3; where the best mean accuracy at the end stands at an end of those tried, one more is tried. Among equals
the smallest is chosen. What comes out stands in ``layca_fast/commands/demo/bases.py``.

Needs the extra "demo" (matplotlib, mlxtend, rich) and pandas.
"""

import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent / "papers"))
from study import Case, Number, Numbers, Study, Table, best_rate, widened

from layca_fast.commands.demo.bases import PAPER_BASES, contestants
from layca_fast.commands.demo.main import EPOCHS
from layca_fast.commands.demo.training import Digits, load_digits, train
from layca_fast.figures.style import new_figure

FOLDER = Path(__file__).parent

#: The powers to begin with: plain, and with Layca.
STARTS = {
    "sgd": ((-1, 0, 1), (-4, -3, -2)),
    "sgd_amom": ((0, 1, 2), (-4, -3, -2)),
    "rmsprop": ((-6, -5, -4), (-3, -2, -1)),
    "adam": ((-5, -4, -3), (-4, -3, -2)),
    "adagrad": ((-4, -3, -2), (-3, -2, -1)),
}
PLAIN, LAYCA = SIDES = ("torch.optim", "FusedLayca")
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7")
QUANTITY = "validation accuracy"


@cache
def digits() -> Digits:
    """To test on: those of the validation."""
    return load_digits(validation=True)


def cases(found: Numbers) -> Sequence[Case]:
    """Rates around the best of each."""
    wanted: list[Case] = []
    for base, starts in STARTS.items():
        for side, start in zip(SIDES, starts, strict=True):
            mine = found.of(base=base, optimizer=side) if len(found.frame) else found
            wanted += [{"base": base, "optimizer": side, "lr": lr} for lr in widened(mine, start)]
    return wanted


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """The demo's training at one rate, shorter where it is to be quick."""
    rate = 3.0 ** int(case["lr"])
    racers = contestants(str(case["base"]), "auto", torch.device("cpu"), plain_rate=rate, layca_rate=rate)
    racer = dict(zip(SIDES, racers, strict=True))[str(case["optimizer"])]
    run = train(
        racer.optimizer, digits(), epochs=EPOCHS // 10 if quick else EPOCHS, seed=seed, on_epoch=lambda accuracy: None
    )
    yield QUANTITY, 0, run.accuracy[-1]


def chosen(numbers: Numbers, base: str, side: str) -> tuple[int, Numbers]:
    """The power, and the accuracies at it."""
    mine = numbers.of(QUANTITY, base=base, optimizer=side)
    lr = int(best_rate(mine, QUANTITY))
    return lr, mine.of(lr=lr)


def table(numbers: Numbers) -> Table:
    """What is chosen for each base."""
    rows = []
    for base in PAPER_BASES:
        if len(numbers.of(base=base).frame):
            found = [chosen(numbers, base, side) for side in SIDES]
            rows.append([base, *(cell for lr, best in found for cell in (f"3^{lr}", f"{best.mean():.3f}"))])
    return ["base", *(column for side in SIDES for column in ("lr", f"{side}, {QUANTITY}"))], rows


def draw(path: Path, numbers: Numbers) -> None:
    """Accuracy at the end by rate, a panel for each side; dots are what is chosen."""
    with new_figure((7.2, 2.5), path) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, side in zip(panels, SIDES, strict=True):
            for base, colour in zip(PAPER_BASES, COLOURS, strict=True):
                means = numbers.of(QUANTITY, base=base, optimizer=side).frame.groupby("lr")["value"].mean()
                axes.plot([3.0**power for power in means.index], means, ".-", color=colour, label=base)
                lr, best = chosen(numbers, base, side)
                axes.plot(3.0**lr, best.mean(), "o", color=colour, markersize=6)
            axes.set_xscale("log", base=3)
            axes.set_xlabel("lr")
            axes.set_title(side)
        panels[0].set_ylabel(QUANTITY)
        panels[0].legend()


def check(numbers: Numbers) -> None:
    """All train."""
    for name, mine in numbers.of(QUANTITY).frame.groupby(["base", "optimizer"]):
        assert mine["value"].max() > 0.5, f"{name} does not train"


STUDY = Study(
    name="demo_rates",
    doc=__doc__,
    cases=cases,
    measure=measure,
    quick=[
        {"base": base, "optimizer": side, "lr": starts[place][1]}
        for base, starts in STARTS.items()
        for place, side in enumerate(SIDES)
    ],
    table=table,
    draw=draw,
    check=check,
    results=FOLDER / "results",
    figures=FOLDER.parent / "docs",
    seeds=1,
)

if __name__ == "__main__":
    STUDY.main()
