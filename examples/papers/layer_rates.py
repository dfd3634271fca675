"""Rotation rates that differ by layer: the same for all is best, and unequal ones make plateaus (arXiv 1806.01603).

An MLP of 8 hidden layers of 64 units with batch norm on 1,000 digits, 40 epochs; lr falls to a fifth after epochs 30
and 36. alpha < 0: the first layers turn faster, alpha > 0: the last ones, by the paper's factors; FusedLayca and SGD
with the same. The rate is a power of 3, chosen at alpha = 0 on 1,000 validation digits, and held for the others.
Then the demo's network of 8 convolutions, 10 epochs of FusedLayca at 3^-2, which same_budget.py chooses for it.

    python examples/papers/layer_rates.py --seeds 3   # 4 minutes on one core
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from small import make_optimizer, mlp, trained
from study import Case, Number, Numbers, Study, Table, best_rate, widened

from layca_fast import RotationMonitor
from layca_fast.commands.demo.training import Network
from layca_fast.figures.style import new_figure

NAMES = {"layca-sgd": "FusedLayca", "sgd": "SGD"}
STARTS = {"layca-sgd": (-4, -3, -2), "sgd": (-2, -1, 0)}
ALPHAS = (-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8)
MLP, DEMO = "MLP", "demo's network"
EPOCHS = {MLP: 40, DEMO: 10}
DEMO_ALPHAS = (-0.6, 0.0, 0.6)


def case(name: str, alpha: float, lr: int, network: str = MLP) -> Case:
    """One training."""
    return {"network": network, "optimizer": name, "alpha": alpha, "lr": lr}


def cases(found: Numbers) -> Sequence[Case]:
    """Rates at alpha = 0, and the best of them at all."""
    wanted = []
    for name, start in STARTS.items():
        mine = found.of(network=MLP, optimizer=name, alpha=0.0) if len(found.frame) else found
        powers = widened(mine, start)
        wanted += [case(name, 0.0, lr) for lr in powers]
        if len(mine.frame) and set(powers) <= set(mine.frame["lr"]):
            wanted += [case(name, alpha, int(best_rate(mine))) for alpha in ALPHAS if alpha]
    return wanted + [case("layca-sgd", alpha, -2, DEMO) for alpha in DEMO_ALPHAS]


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """Train; note curves, and how far each layer has turned."""
    model = mlp() if case["network"] == MLP else Network()
    optimizer = make_optimizer(str(case["optimizer"]), model, 3.0 ** int(case["lr"]), float(case["alpha"]))
    monitor = RotationMonitor(model, every=20)
    yield from trained(
        model, optimizer, 12 if quick else EPOCHS[str(case["network"])], seed, every=5, on_step=monitor.record
    )
    for layer, rotation in enumerate(monitor.curves.rotation[-1].tolist()):
        yield "rotation", layer, rotation


def at(numbers: Numbers, name: str, alpha: float) -> Numbers:
    """The trainings of the MLP at the rate that was chosen."""
    mine = numbers.of(network=MLP, optimizer=name)
    return mine.of(alpha=alpha, lr=best_rate(mine.of(alpha=0.0)))


def table(numbers: Numbers) -> Table:
    """Final test accuracy, and the training loss halfway, by alpha."""
    names = [name for name in NAMES if len(numbers.of(optimizer=name).frame)]
    half = float(max(numbers.of("training loss").frame["at"]) // 2)
    rows = []
    for alpha in sorted(numbers.frame["alpha"].unique()):
        found = [at(numbers, name, alpha) for name in names]
        cells = [(each.of("test accuracy").span(), each.of("training loss", at=half).span(2)) for each in found]
        demo = numbers.of("test accuracy", network=DEMO, alpha=alpha)
        rows.append([f"{alpha:g}", *(cell for pair in cells for cell in pair), demo.span() if len(demo.frame) else ""])
    columns = [f"{NAMES[name]}: {what}" for name in names for what in ("test accuracy", f"loss, epoch {half:.0f}")]
    return ["alpha", *columns, "FusedLayca, demo's network: test accuracy"], rows


def draw(path: Path, numbers: Numbers) -> None:
    """Final accuracy by alpha; training loss and test accuracy by epoch, for FusedLayca."""
    colours = dict(zip(ALPHAS, matplotlib.colormaps["coolwarm"]([i / 8 for i in range(9)]), strict=True))
    colours[0.0] = "black"
    with new_figure((7.2, 2.5), path) as figure:
        left, middle, right = figure.subplots(1, 3)
        for name, colour in (("layca-sgd", "#c4402f"), ("sgd", "0.5")):
            ends = [at(numbers, name, alpha).of("test accuracy").values() for alpha in ALPHAS]
            left.plot(ALPHAS, [sum(each) / len(each) for each in ends], ".-", color=colour, label=NAMES[name])
            left.fill_between(ALPHAS, [min(e) for e in ends], [max(e) for e in ends], color=colour, alpha=0.15)
        ends = [numbers.of("test accuracy", network=DEMO, alpha=alpha).mean() for alpha in DEMO_ALPHAS]
        left.plot(DEMO_ALPHAS, ends, ".--", color="#c4402f", label="FusedLayca, convolutions")
        left.set_xlabel("alpha (< 0: first layers faster)")
        left.set_ylabel("final test accuracy")
        left.legend(loc="lower left", fontsize=7)
        for alpha in (-0.8, -0.4, 0.0, 0.4, 0.8):
            mine = at(numbers, "layca-sgd", alpha)
            for axes, quantity in ((middle, "training loss"), (right, "test accuracy by epoch")):
                curve = mine.of(quantity).by_seed().mean(axis=1)
                axes.plot(curve.index, curve, color=colours[alpha], linewidth=1.2, label=f"{alpha:g}")
        middle.set_yscale("log")
        middle.set_ylabel("training loss, FusedLayca")
        right.set_ylabel("test accuracy, FusedLayca")
        right.legend(title="alpha", fontsize=6, title_fontsize=6)
        for axes in (middle, right):
            axes.set_xlabel("epoch")


def check(numbers: Numbers) -> None:
    """FusedLayca: a network whose last layers turn much faster than its first generalises worse."""
    uniform, last = (at(numbers, "layca-sgd", alpha).of("test accuracy").mean() for alpha in (0.0, 0.8))
    assert uniform > last + 0.05, f"alpha = 0.8 gives {last}, alpha = 0 {uniform}"


STUDY = Study(
    name="layer_rates",
    doc=__doc__,
    cases=cases,
    measure=measure,
    quick=[case("layca-sgd", alpha, -3) for alpha in (-0.8, 0.0, 0.8)],
    table=table,
    draw=draw,
    check=check,
)

if __name__ == "__main__":
    STUDY.main()
