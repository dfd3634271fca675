"""What healthy and unhealthy layer rotation look like: six trainings of the demo's network, and one figure.

``python examples/healthy_rotation.py --out docs/healthy_rotation.png`` made the figure of docs/monitoring.md, in about
a minute on one core. Needs the extra "demo" (matplotlib, mlxtend, rich).
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from layca_fast import FusedLayca
from layca_fast.commands.demo.training import Run, load_digits, one_cpu_thread, train
from layca_fast.figures.console import print_table
from layca_fast.figures.style import new_figure
from layca_fast.groups.layer_groups import lr_factors

EPOCHS = 12
RATE = 3**-3


@dataclass(frozen=True)
class Case:
    """A training: its title in the figure, and what makes its optimizer."""

    title: str
    make: Callable[[Iterable[Parameter]], Optimizer]


def layca(lr: float, alpha: float = 0.0) -> Callable[[Iterable[Parameter]], Optimizer]:
    """FusedLayca with the paper's layer-wise rates, as ``layer_groups(model, alpha=alpha)`` sets them."""

    def make(params: Iterable[Parameter]) -> Optimizer:
        layers = list(params)
        factors = lr_factors(len(layers), alpha)
        groups = [{"params": [layer], "lr_factor": factor} for layer, factor in zip(layers, factors, strict=True)]
        return FusedLayca(groups, lr=lr)

    return make


def plain_sgd(params: Iterable[Parameter]) -> Optimizer:
    """With nothing that keeps the layers at one rate."""
    return SGD(params, lr=1.0)


CASES = (
    Case("far too small: lr 3⁻⁷", layca(3**-7)),
    Case("healthy: lr 3⁻³", layca(RATE)),
    Case("far too large: lr 1", layca(1.0)),
    Case("first layers only: lr 3⁻³, alpha −0.6", layca(RATE, -0.6)),
    Case("last layers only: lr 3⁻³, alpha 0.6", layca(RATE, 0.6)),
    Case("SGD: lr 1", plain_sgd),
)


def draw(path: Path, results: Sequence[tuple[Case, Run]]) -> None:
    """Write the rotation curves, one panel a training and one line a layer, to ``path`` as a PNG."""
    highest = max(max(row) for _, run in results for row in run.rotation)
    with new_figure((7.2, 4.2), path) as figure:
        panels = figure.subplots(2, 3, sharex=True, sharey=True)
        for axes, (case, run) in zip(panels.flat, results, strict=True):
            curves = np.array(run.rotation)
            colours = matplotlib.colormaps["viridis"](np.linspace(0, 1, curves.shape[1]))
            for layer, curve in enumerate(curves.T):
                axes.plot(curve, color=colours[layer], linewidth=1.2)
            axes.set_title(f"{case.title}\ntest accuracy {run.accuracy[-1]:.3f}")
        panels[0, 0].set_xlim(0, len(results[0][1].rotation) - 1)
        panels[0, 0].set_ylim(0, max(1.0, 1.02 * highest))
        for axes in panels[:, 0]:
            axes.set_ylabel(r"layer rotation, $1-\cos(w_t, w_0)$")
        for axes in panels[-1]:
            axes.set_xlabel("epoch")
        bar = figure.colorbar(ScalarMappable(cmap="viridis"), ax=panels, ticks=[0, 1], aspect=40, pad=0.015)
        bar.set_ticklabels(["first\nlayer", "last\nlayer"])
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)


def main(argv: Sequence[str] | None = None) -> None:
    """Train all cases, print a table, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each training (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("healthy_rotation.png"), help="default: %(default)s")
    options = parser.parse_args(argv)
    digits = load_digits()
    results = []
    with one_cpu_thread():
        for case in CASES:
            run = train(case.make, digits, epochs=options.epochs, seed=0, on_epoch=lambda accuracy: None)
            results.append((case, run))
    rows = [
        [case.title, f"{run.accuracy[-1]:.3f}", f"{min(run.rotation[-1]):.3f}", f"{max(run.rotation[-1]):.3f}"]
        for case, run in results
    ]
    print_table(
        "Rotation of the layers at the end: 1 - cos(w, w0), least and most",
        ["training", "test accuracy", "least", "most"],
        rows,
    )
    draw(options.out, results)
    print(f"figure: {options.out}")


if __name__ == "__main__":
    main()
