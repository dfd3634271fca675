"""The demo's figure: test accuracy beside the layer rotation curves of each optimizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure

from .demo_training import DROP_FACTOR, Contestant, Run, drop_epochs

#: Inches: the text width of a two-column page.
SIZE, DPI = (7.2, 2.5), 300

STYLE: Mapping[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "legend.fontsize": 8,
    "legend.frameon": False,
}

#: Ticks of the accuracy axis, which ends at this error at the latest: a logarithm has no zero.
ACCURACY_TICKS, SMALLEST_ERROR = (0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999), 5e-4

#: Of the accuracy curves, in their order: none is a colour of viridis, and they differ in print without colour, too.
COLOURS = ("0.6", "#c4402f")

#: Each optimizer with its runs, one per seed.
Results = Sequence[tuple[Contestant, Sequence[Run]]]

Values = npt.NDArray[np.float64]


def save_figure(path: Path, results: Results) -> None:
    """Write the figure of these results to ``path`` as a PNG.

    Curves are means over the seeds; where there are several, bands show the lowest and the highest accuracy. Neither
    pyplot's figures nor matplotlib's settings are touched.
    """
    _, (first, *_) = results[0]
    epochs, layers = len(first.accuracy) - 1, len(first.rotation[0])
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 1, layers)))
    with matplotlib.rc_context(dict(STYLE)):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 1 + len(results), width_ratios=[1.3] + [1.0] * len(results))
        _draw_accuracy(panels[0], results)
        for axes, (contestant, runs) in zip(panels[1:], results, strict=True):
            _draw_rotation(axes, runs, colours)
            axes.set_title(f"{contestant.name}\nlr {contestant.rate}")
            axes.tick_params(labelleft=axes is panels[1])
        panels[1].set_ylabel(r"layer rotation, $1-\cos(w_t, w_0)$")
        for axes in panels:
            _draw_epochs(axes, epochs)
        _name_drops(panels[1], epochs)
        _draw_layer_scale(figure, panels[1:], colours)
        figure.savefig(path, dpi=DPI, format="png")


def _draw_accuracy(axes: Axes, results: Results) -> None:
    for (contestant, runs), colour in zip(results, COLOURS, strict=True):
        curves = np.array([run.accuracy for run in runs])
        label = f"{contestant.name}: {curves[:, -1].mean():.3f}"
        axes.plot(curves.mean(0), color=colour, linewidth=1.2, label=label)
        if len(runs) > 1:
            low, high = curves.min(0), curves.max(0)
            axes.fill_between(range(len(low)), low, high, color=colour, alpha=0.2, linewidth=0)
    # The climb takes up most of [0, 1] and the curves part in its last few per cent: equal distances along the axis
    # are equal ratios of the error.
    axes.set_yscale("function", functions=(_height, _accuracy_at))
    best = max(max(run.accuracy) for _, runs in results for run in runs)
    top = 1 - max(0.7 * (1 - best), SMALLEST_ERROR)
    axes.set_ylim(0, top)
    ticks = [tick for tick in ACCURACY_TICKS if tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylabel("test accuracy (log of the error)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1, labelspacing=0.2)


def _height(accuracy: Values) -> Values:
    return -np.log(np.maximum(1 - accuracy, SMALLEST_ERROR))


def _accuracy_at(height: Values) -> Values:
    return 1 - np.exp(-height)


def _draw_rotation(axes: Axes, runs: Sequence[Run], colours: Colormap) -> None:
    curves = np.mean([run.rotation for run in runs], axis=0)
    for layer, curve in enumerate(curves.T):
        axes.plot(curve, color=colours(layer), linewidth=1.2)
    axes.set_ylim(0, max(1.0, 1.02 * curves.max()))


def _draw_epochs(axes: Axes, epochs: int) -> None:
    for drop in drop_epochs(epochs):
        axes.axvline(drop, color="0.75", linewidth=0.6, linestyle=(0, (2, 2)), zorder=0)
    axes.set_xlim(0, epochs)
    axes.set_xlabel("epoch")


def _name_drops(axes: Axes, epochs: int) -> None:
    for drop in drop_epochs(epochs):
        axes.annotate(
            f"lr × {DROP_FACTOR}",
            (drop, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-1.5, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            rotation=90,
            fontsize=6,
            color="0.45",
        )


def _draw_layer_scale(figure: Figure, panels: Sequence[Axes], colours: Colormap) -> None:
    edges = np.arange(colours.N + 1) + 0.5
    scale = ScalarMappable(BoundaryNorm(edges, colours.N), colours)
    bar = figure.colorbar(scale, ax=panels, ticks=[1, colours.N], aspect=25, pad=0.015)
    bar.minorticks_off()
    bar.set_ticklabels(["first\nlayer", "last\nlayer"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
