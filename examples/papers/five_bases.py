"""Five base optimizers, plain and with Layca: how far apart they end (arXiv 1806.01603).

An MLP of 8 hidden layers of 64 units with batch norm on 1,000 digits, 20 epochs; lr falls to a fifth after epochs 15
and 18. The bases are the paper's, each as torch has it and as FusedLayca has it. Rates are powers of 3, chosen on 1,000
validation digits; where the best stands at an end, one more is tried.

    python examples/papers/five_bases.py --seeds 3   # 3 minutes on one core
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from small import make_optimizer, mlp, trained
from study import Case, Number, Numbers, Study, Table, best_rate, widened

from layca_fast.figures.style import new_figure

#: The rates to begin with, plain and with Layca.
STARTS = {
    "sgd": ((-2, -1, 0), (-4, -3, -2)),
    "sgd_amom": ((-1, 0, 1), (-4, -3, -2)),
    "rmsprop": ((-6, -5, -4), (-3, -2, -1)),
    "adam": ((-5, -4, -3), (-4, -3, -2)),
    "adagrad": ((-4, -3, -2), (-3, -2, -1)),
}
COLOURS = dict(zip(STARTS, ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7"), strict=True))
SIDES = {"": "torch.optim", "layca-": "FusedLayca"}
EPOCHS = 20


def case(name: str, lr: int) -> Case:
    """One training."""
    return {"optimizer": name, "lr": lr}


def cases(found: Numbers) -> Sequence[Case]:
    """Rates around the best of each."""
    wanted = []
    for base, starts in STARTS.items():
        for side, start in zip(SIDES, starts, strict=True):
            mine = found.of(optimizer=side + base) if len(found.frame) else found
            wanted += [case(side + base, lr) for lr in widened(mine, start)]
    return wanted


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """Train at one rate."""
    model = mlp()
    optimizer = make_optimizer(str(case["optimizer"]), model, 3.0 ** int(case["lr"]))
    return trained(model, optimizer, 10 if quick else EPOCHS, seed)


def chosen(numbers: Numbers, name: str) -> tuple[int, Numbers]:
    """The power chosen on validation digits, and the trainings at it."""
    mine = numbers.of(optimizer=name)
    lr = int(best_rate(mine))
    return lr, mine.of(lr=lr)


def spreads(numbers: Numbers, side: str) -> tuple[float, float]:
    """Over the bases of a side: best less worst final test accuracy, and the same of log10 of the training loss, mean.

    The second is over the epochs of the first three quarters, before lr falls.
    """
    found = [chosen(numbers, side + base)[1] for base in STARTS]
    ends = [each.of("test accuracy").mean() for each in found]
    curves = [each.of("training loss").by_seed().mean(axis=1).head(3 * EPOCHS // 4) for each in found]
    logs = [curve.map(math.log10) for curve in curves]
    apart = fmean(max(values) - min(values) for values in zip(*logs, strict=True))
    return max(ends) - min(ends), apart


def table(numbers: Numbers) -> Table:
    """Final test accuracy of each base, and the spread over the bases."""
    rows = []
    for base in STARTS:
        cells = []
        for side in SIDES:
            lr, mine = chosen(numbers, side + base)
            cells += [f"3^{lr}", mine.of("test accuracy").span()]
        rows.append([base, *cells])
    (plain, plain_curves), (layca, layca_curves) = (spreads(numbers, side) for side in SIDES)
    rows.append(["best less worst, in points", "", f"{100 * plain:.1f}", "", f"{100 * layca:.1f}"])
    rows.append(["training loss, largest over smallest", "", f"{10**plain_curves:.2f}", "", f"{10**layca_curves:.2f}"])
    return ["base", "lr", "torch.optim, test accuracy", "lr", "FusedLayca, test accuracy"], rows


def draw(path: Path, numbers: Numbers) -> None:
    """Training loss of all bases, a panel a side, and their final test accuracy."""
    with new_figure((7.2, 2.5), path) as figure:
        *panels, last = figure.subplots(1, 3)
        panels[1].sharey(panels[0])
        for place, (axes, (side, title)) in enumerate(zip(panels, SIDES.items(), strict=True)):
            for row, (base, colour) in enumerate(COLOURS.items()):
                _, mine = chosen(numbers, side + base)
                curve = mine.of("training loss").by_seed().mean(axis=1)
                axes.plot(curve.index, curve, color=colour, linewidth=1.2, label=base)
                ends, height = mine.of("test accuracy").values(), row + 0.3 * (place - 0.5)
                last.plot([min(ends), max(ends)], [height] * 2, color=colour)
                last.plot(
                    fmean(ends), height, "o", color=colour, markersize=4, markerfacecolor=("white", colour)[place]
                )
            axes.set_yscale("log")
            axes.set_title(title)
            axes.set_xlabel("epoch")
        panels[0].set_ylabel("training loss")
        panels[0].legend(fontsize=6)
        last.set_yticks(range(5), list(STARTS))
        last.invert_yaxis()
        last.set_title("○ torch.optim   ● FusedLayca")
        last.set_xlabel("final test accuracy")


def check(numbers: Numbers) -> None:
    """All bases train; which spread is smaller is no matter of seconds."""
    for name in set(numbers.frame["optimizer"]):
        assert chosen(numbers, name)[1].of("test accuracy").mean() > 0.7, f"{name} does not train"


STUDY = Study(
    name="five_bases",
    doc=__doc__,
    cases=cases,
    measure=measure,
    quick=[case(side + base, starts[n][1]) for base, starts in STARTS.items() for n, side in enumerate(SIDES)],
    table=table,
    draw=draw,
    check=check,
)

if __name__ == "__main__":
    STUDY.main()
