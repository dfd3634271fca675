"""Equal lr over batch size, equal ends (Jastrzębski et al., Three factors influencing minima in SGD).

An MLP of 3 hidden layers of 64 units without batch norm (which depends on the batch by itself) on 1,000 digits, 20
epochs at a constant lr: batches of 9, 27 and 81, three values of lr / batch, SGD. Noted is where the nine trainings
end: loss, test accuracy, the largest eigenvalue of the covariance of gradients (of 20 batches of 50), and how far the
layers have turned. FusedLayca with the same lr / batch, and with equal lr^2 / batch: its steps have a length whatever
the gradient is, so that noise makes it turn by lr times the root of the number of steps.

    python examples/papers/lr_over_batch.py --seeds 3   # 3 minutes on one core
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from break_even import flat, largest
from small import make_optimizer, mlp, trained
from study import Case, Number, Numbers, Study, Table

from layca_fast import RotationMonitor
from layca_fast.diagnostics import noise_scale
from layca_fast.figures.style import new_figure

BATCHES, EPOCHS = (9, 27, 81), 20
SGD, LAYCA, LAYCA_ROOT = RULES = ("SGD, lr / batch", "FusedLayca, lr / batch", "FusedLayca, lr^2 / batch")
COLOURS = dict(zip(RULES, ("0.4", "#e69f00", "#c4402f"), strict=True))

#: lr at a batch of 27, as powers of 3.
LEVELS = {SGD: (-4, -3, -2), LAYCA: (-5, -4, -3), LAYCA_ROOT: (-5, -4, -3)}


def case(rule: str, level: int, batch: int) -> Case:
    """One training."""
    return {"rule": rule, "level": level, "batch": batch}


def rate(case: Case) -> float:
    """So that what the rule holds is the same for all batches of a level."""
    middle, batch = 3.0 ** int(case["level"]), int(case["batch"])
    scale = noise_scale(middle, BATCHES[1])
    return middle * math.sqrt(batch / BATCHES[1]) if case["rule"] == LAYCA_ROOT else scale * batch


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """Train; note where it ends."""
    model = mlp(depth=3, norm=False)
    optimizer = make_optimizer("sgd" if case["rule"] == SGD else "layca-sgd", model, rate(case))
    monitor = RotationMonitor(model)
    batch, loss = int(case["batch"]), math.nan
    for quantity, at, value in trained(model, optimizer, 5 if quick else EPOCHS, seed, batch=batch, schedule=flat):
        loss = value if quantity == "training loss" else loss
        if quantity != "training loss":
            yield quantity, at, value
    monitor.record()
    yield "final loss", 0, loss
    yield "rotation", 0, monitor.curves.rotation[-1].mean().item()
    yield "eigenvalue", 0, largest(model)


def apart(numbers: Numbers, rule: str, quantity: str) -> tuple[float, float]:
    """Standard deviations of the log: over batches at one level, mean; and over levels at one batch, mean."""
    mine = numbers.of(quantity, rule=rule).frame.groupby(["level", "batch"])["value"].mean().unstack()
    logs = np.log(mine.to_numpy())
    return float(logs.std(axis=1).mean()), float(logs.std(axis=0).mean())


def table(numbers: Numbers) -> Table:
    """How far ends lie apart, at equal scale and across scales, as factors; and rotations."""
    rows = []
    for rule in [rule for rule in RULES if rule in set(numbers.frame["rule"])]:
        cells = []
        for quantity in ("rotation", "final loss", "eigenvalue"):
            cells += [f"{math.exp(each):.2f}" for each in apart(numbers, rule, quantity)]
        rows.append([rule, *cells])
    columns = [f"{name}: {which}" for name in ("rotation", "loss", "K") for which in ("equal", "unequal")]
    return ["what is held", *columns], rows


def draw(path: Path, numbers: Numbers) -> None:
    """Each end against batch size, a line for each level."""
    with new_figure((7.2, 3.6), path) as figure:
        grid = figure.subplots(2, 3, sharex=True)
        quantities = {"rotation": "1 − cos(w, w₀), mean", "final loss": "training loss, last epoch"}
        for row, (quantity, label) in zip(grid, quantities.items(), strict=True):
            for axes, rule in zip(row, RULES, strict=True):
                for level, line in zip(LEVELS[rule], (":", "--", "-"), strict=True):
                    mine = numbers.of(quantity, rule=rule, level=level).frame.groupby("batch")["value"]
                    axes.plot(mine.mean(), line, marker=".", color=COLOURS[rule])
                    axes.fill_between(mine.min().index, mine.min(), mine.max(), color=COLOURS[rule], alpha=0.15)
                axes.set_yscale("log")
                axes.set_xscale("log")
                axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
                axes.minorticks_off()
            row[0].set_ylabel(label)
        for axes, rule in zip(grid[0], RULES, strict=True):
            levels = ", ".join(f"$3^{{{level}}}$" for level in LEVELS[rule])
            axes.set_title(f"{rule.replace('^2', '²')}\nlr at 27: {levels}")
        for axes in grid[1]:
            axes.set_xlabel("batch")


def check(numbers: Numbers) -> None:
    """SGD's rotation differs less between batches at equal lr / batch than between values of it."""
    equal, unequal = apart(numbers, SGD, "rotation")
    assert equal < unequal / 2, f"at equal lr / batch rotation differs by {equal}, else by {unequal}"


STUDY = Study(
    name="lr_over_batch",
    doc=__doc__,
    cases=lambda _: [case(rule, level, batch) for rule in RULES for level in LEVELS[rule] for batch in BATCHES],
    measure=measure,
    quick=[case(SGD, level, batch) for level in (-4, -2) for batch in (27, 81)],
    table=table,
    draw=draw,
    check=check,
)

if __name__ == "__main__":
    STUDY.main()
