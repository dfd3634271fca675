"""The scale of the initial weights moves SGD's best learning rate, and not Layca's (arXiv 1806.01603).

An MLP of 8 hidden layers of 64 units on 1,000 digits, 20 epochs, with batch norm without scale or shift after every
layer, the classifier included, so that it is the same function at every scale of its weights: 1/9, 1, 9. Rates are
powers of 3, chosen on 1,000 validation digits; where the best stands at an end, one more is tried.

    python examples/papers/init_scale.py --seeds 3   # 2 minutes on one core
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from small import make_optimizer, mlp, trained
from study import Case, Number, Numbers, Study, Table, best_rate, widened
from torch import nn

from layca_fast.figures.style import new_figure

NAMES = {"layca-sgd": "FusedLayca", "sgd": "SGD"}
COLOURS = {"layca-sgd": "#c4402f", "sgd": "0.5"}

#: Powers of 3.
SCALES = (-2, 0, 2)
EPOCHS = 20


def start(name: str, scale: int) -> Sequence[int]:
    """The rates to begin with: SGD's where the scale's square takes them, so that few more are tried."""
    return (-5, -4, -3, -2, -1) if name == "layca-sgd" else tuple(2 * scale + power for power in (-2, -1, 0, 1, 2))


def case(name: str, scale: int, lr: int) -> Case:
    """One training."""
    return {"optimizer": name, "scale": scale, "lr": lr}


def cases(found: Numbers) -> Sequence[Case]:
    """Rates around the best of each."""
    wanted = []
    for name in NAMES:
        for scale in SCALES:
            mine = found.of(optimizer=name, scale=scale) if len(found.frame) else found
            wanted += [case(name, scale, lr) for lr in widened(mine, start(name, scale))]
    return wanted


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """Train at one rate."""
    model = mlp().append(nn.BatchNorm1d(10, affine=False))
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3.0 ** int(case["scale"]))
    optimizer = make_optimizer(str(case["optimizer"]), model, 3.0 ** int(case["lr"]))
    return trained(model, optimizer, 5 if quick else EPOCHS, seed)


def best(numbers: Numbers, name: str, scale: int) -> tuple[int, Numbers]:
    """The power chosen on validation digits, and what it gave on the test digits."""
    mine = numbers.of(optimizer=name, scale=scale)
    lr = int(best_rate(mine))
    return lr, mine.of("test accuracy", lr=lr)


def told(power: int) -> str:
    """A power of 3 in print."""
    return f"3^{power}"


def table(numbers: Numbers) -> Table:
    """Best rate, and test accuracy there, by scale."""
    scales = sorted(numbers.frame["scale"].unique())
    rows = []
    for name, shown in NAMES.items():
        found = [best(numbers, name, scale) for scale in scales]
        rows.append([f"{shown}, best lr", *(told(lr) for lr, _ in found)])
        rows.append([f"{shown}, test accuracy", *(test.span() for _, test in found)])
    return ["initial weights times", *(told(scale) for scale in scales)], rows


def draw(path: Path, numbers: Numbers) -> None:
    """Validation accuracy against rate, a line per scale; the best rate against scale."""
    shades = dict(zip(SCALES, ("#3b528b", "#21918c", "#d0b000"), strict=True))
    with new_figure((7.2, 2.5), path) as figure:
        *panels, last = figure.subplots(1, 3, width_ratios=[1, 1.3, 0.9])
        for axes, (name, shown) in zip(panels, NAMES.items(), strict=True):
            for scale in SCALES:
                mine = numbers.of("validation accuracy", optimizer=name, scale=scale).frame
                curve = mine.groupby("lr")["value"].mean()
                axes.plot(3.0**curve.index, curve, ".-", color=shades[scale], linewidth=1, label=f"x {3.0**scale:.3g}")
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter("")
            axes.set_title(shown)
            axes.set_xlabel("lr")
            axes.set_ylim(0.8, 0.95)
        panels[0].set_ylabel("validation accuracy")
        panels[1].tick_params(labelleft=False)
        panels[1].legend(fontsize=6, loc="lower left")
        for name, shown in NAMES.items():
            rates = [3.0 ** best(numbers, name, scale)[0] for scale in SCALES]
            last.loglog([3.0**scale for scale in SCALES], rates, ".-", color=COLOURS[name], label=shown)
        last.set_xlabel("scale of the initial weights")
        last.set_ylabel("best lr")
        last.legend(fontsize=7)


def check(numbers: Numbers) -> None:
    """From 1/9 to 9, SGD's best rate moves by a factor of 50 at least, FusedLayca's by 3 at most."""
    ends = min(numbers.frame["scale"]), max(numbers.frame["scale"])
    moved = {name: abs(best(numbers, name, ends[1])[0] - best(numbers, name, ends[0])[0]) for name in NAMES}
    assert moved["layca-sgd"] <= 1, f"FusedLayca's best rate moves by 3^{moved['layca-sgd']}"
    assert moved["sgd"] >= math.log(50, 3), f"SGD's best rate moves by 3^{moved['sgd']} only"


STUDY = Study(
    name="init_scale",
    doc=__doc__,
    cases=cases,
    measure=measure,
    quick=[case("layca-sgd", scale, lr) for scale in (-2, 2) for lr in (-5, -3, -1)]
    + [case("sgd", scale, lr) for scale in (-2, 2) for lr in (-4, 0, 4)],
    table=table,
    draw=draw,
    check=check,
)

if __name__ == "__main__":
    STUDY.main()
