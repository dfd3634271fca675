"""Beyond the break-even point a larger lr leaves gradients with a smaller covariance (Jastrzębski et al.).

The largest eigenvalue of the covariance of mini-batch gradients, K, by lr, which stays as it is: an MLP of 3 hidden
layers of 64 units without batch norm on 1,000 digits, batches of 50, SGD, and FusedLayca (which keeps the norm of the
weights), until an epoch's mean training loss is below 0.2, or for 60 epochs. K is of 20 batches of 50, every 10 steps;
the same batches every time. Compared over the same stretch of the loss: the geometric mean of the eigenvalue after the
epoch whose loss is first below 1. Single peaks are reported, too; they are a matter of single steps.

    python examples/papers/break_even.py --seeds 3   # 2 minutes on one core
"""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import torch
from small import BATCH, digits, epochs, make_optimizer, mlp, score
from study import Case, Number, Numbers, Study, Table
from torch import Tensor, nn
from torch.nn import functional

from layca_fast.diagnostics import gradient_covariance
from layca_fast.figures.style import new_figure

EPOCHS, EVERY, FROM, UNTIL = 60, 10, 1.0, 0.2
NAMES = {"sgd": "SGD", "layca-sgd": "FusedLayca"}

#: Powers of 3.
POWERS = {"sgd": (-4, -3, -2, -1), "layca-sgd": (-6, -5, -4, -3)}


def case(name: str, lr: int) -> Case:
    """One training."""
    return {"optimizer": name, "lr": lr}


def largest(model: nn.Module) -> float:
    """The eigenvalue of K."""
    part = digits()["train"]

    def loss(rows: Tensor) -> Tensor:
        return functional.cross_entropy(model(part.images[rows]), part.labels[rows])

    return gradient_covariance(model, loss, torch.arange(1000).split(BATCH)).largest


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """Train at one rate; note the eigenvalue on the way, its peak, and its mean over the stretch."""
    model, step, start = mlp(depth=3, norm=False), 0, math.nan
    seen = {0: largest(model)}

    def look() -> None:
        nonlocal step
        step += 1
        if step % EVERY == 0:
            seen[step] = largest(model)

    optimizer = make_optimizer(str(case["optimizer"]), model, 3.0 ** int(case["lr"]))
    for epoch, loss in epochs(model, optimizer, digits()["train"], EPOCHS, seed, schedule=flat, on_step=look):
        yield "training loss", epoch, loss
        start = step if math.isnan(start) and loss < FROM else start
        if loss < UNTIL:
            break
    for at, value in seen.items():
        yield "eigenvalue", at, value
    yield "peak", 0, max(seen.values())
    logs = [math.log(value) for at, value in seen.items() if at > start]
    yield "over the stretch", 0, math.exp(fmean(logs)) if logs else math.nan
    yield "epochs", 0, epoch
    yield "test accuracy", 0, score(model, digits()["test"])[0]


def flat(_: float) -> float:
    """No schedule."""
    return 1.0


def table(numbers: Numbers) -> Table:
    """The eigenvalue by lr."""
    rows = []
    for name, powers in POWERS.items():
        for lr in [lr for lr in powers if len(numbers.of(optimizer=name, lr=lr).frame)]:
            mine = numbers.of(optimizer=name, lr=lr)
            cells = [mine.of(name).span() for name in ("over the stretch", "peak")]
            rows.append([NAMES[name], f"3^{lr}", *cells, mine.of("epochs").span(0), mine.of("test accuracy").span()])
    return ["optimizer", "lr", "eigenvalue at losses from 1 to 0.2", "its peak", "epochs", "test accuracy"], rows


def draw(path: Path, numbers: Numbers) -> None:
    """The eigenvalue over training, a line for each lr; seed 0, and its mean by lr."""
    shades = ("#440154", "#31688e", "#35b779", "#d0b000")
    with new_figure((7.2, 2.5), path) as figure:
        *panels, right = figure.subplots(1, 3)
        for axes, (name, powers) in zip(panels, POWERS.items(), strict=True):
            for lr, colour in zip(powers, shades, strict=True):
                curve = numbers.of("eigenvalue", optimizer=name, lr=lr, seed=0).by_seed()[0]
                axes.plot(curve.index, curve, color=colour, linewidth=1, label=f"lr $3^{{{lr}}}$")
            axes.set_yscale("log")
            axes.set_xlabel("step")
            axes.set_title(NAMES[name])
            axes.legend(fontsize=6)
        panels[0].set_ylabel("largest eigenvalue of K")
        for name, colour in (("sgd", "0.4"), ("layca-sgd", "#c4402f")):
            peaks = numbers.of("over the stretch", optimizer=name).frame.groupby("lr")["value"]
            rates = [3.0**lr for lr in peaks.mean().index]
            right.loglog(rates, peaks.mean(), ".-", color=colour, label=NAMES[name])
            right.fill_between(rates, peaks.min(), peaks.max(), color=colour, alpha=0.15)
        right.set_xlabel("lr")
        right.set_title("its mean at losses from 1 to 0.2")
        right.legend(fontsize=7)


def check(numbers: Numbers) -> None:
    """Under SGD the eigenvalue at the largest lr is smaller than at one a ninth of it."""
    mine = numbers.of("over the stretch", optimizer="sgd")
    low, high = mine.of(lr=-3).mean(), mine.of(lr=-1).mean()
    assert high < low, f"the eigenvalue is {low} at lr 3^-3, {high} at 3^-1"


STUDY = Study(
    name="break_even",
    doc=__doc__,
    cases=lambda _: [case(name, lr) for name, powers in POWERS.items() for lr in powers],
    measure=measure,
    quick=[case("sgd", -3), case("sgd", -1)],
    table=table,
    draw=draw,
    check=check,
)

if __name__ == "__main__":
    STUDY.main()
