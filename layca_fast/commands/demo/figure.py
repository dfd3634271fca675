"""The demo's figures: one base without and with Layca, and how far the bases end apart without and with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ...figures.style import new_figure
from .tables import final_accuracies, spread_in_points
from .training import DROP_FACTOR, Result, Run, drop_epochs, pairs_of

#: Inches: the text width of a two-column page.
SIZE = (7.2, 2.5)

#: Ticks of the accuracy axis, which ends at this error at the latest: a logarithm has no zero.
ACCURACY_TICKS, SMALLEST_ERROR = (0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999), 5e-4

#: Of the accuracy curves, in their order: none is a colour of viridis, and they differ in print without colour, too.
COLOURS = ("0.6", "#c4402f")

#: One for each base: the palette of Okabe and Ito, which stays apart for colour-blind eyes.
BASE_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7")

LEGEND_ABOVE: Mapping[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "borderaxespad": 0.2,
    "handlelength": 1,
    "labelspacing": 0.2,
}

Results = Sequence[Result]

Values = npt.NDArray[np.float64]


def save_pair(path: Path, results: Results) -> None:
    """Write test accuracy beside the layer rotation curves of each of a few optimizers to ``path`` as a PNG.

    Curves are means over the seeds; where there are several, bands show the lowest and the highest accuracy. Neither
    pyplot's figures nor matplotlib's settings are touched.
    """
    epochs = _epochs_of(results)
    _, (first, *_) = results[0]
    layers = len(first.rotation[0])
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 1, layers)))
    with new_figure(SIZE, path) as figure:
        panels = figure.subplots(1, 1 + len(results), width_ratios=[1.3] + [1.0] * len(results))
        _draw_curves(panels[0], results, COLOURS, bands=True)
        _scale_accuracy(panels[0], results)
        _draw_names(panels[0], results)
        for axes, (contestant, runs) in zip(panels[1:], results, strict=True):
            _draw_rotation(axes, runs, colours)
            axes.set_title(f"{contestant.name}\nlr {contestant.rate}")
            axes.tick_params(labelleft=axes is panels[1])
        panels[1].set_ylabel(r"layer rotation, $1-\cos(w_t, w_0)$")
        for axes in panels:
            _draw_epochs(axes, epochs)
        _name_drops(panels[1], epochs, at_the_top=True)
        _draw_layer_scale(figure, panels[1:], colours)


def save_bases(path: Path, results: Results) -> None:
    """Write test accuracy of all bases, plain and with Layca in turn in ``results``, to ``path`` as a PNG.

    Left and middle: curves without and with Layca, means over the seeds. Right: where they end, with the range over the
    seeds, and shaded the spread over the bases. Neither pyplot's figures nor matplotlib's settings are touched.
    """
    plain, layca = pairs_of(results)
    with new_figure(SIZE, path) as figure:
        panels = figure.subplots(1, 3, width_ratios=[1.0, 1.0, 1.25])
        for axes, side, title in ((panels[0], plain, "torch.optim"), (panels[1], layca, "FusedLayca on the same base")):
            _draw_curves(axes, side, BASE_COLOURS, bands=False)
            _scale_accuracy(axes, results)
            _draw_epochs(axes, _epochs_of(results))
            axes.set_title(title)
            axes.tick_params(labelleft=axes is panels[0])
        _name_drops(panels[0], _epochs_of(results), at_the_top=False)
        panels[1].set_ylabel("")
        _draw_finals(panels[2], plain, layca)


def _epochs_of(results: Results) -> int:
    _, (first, *_) = results[0]
    return len(first.accuracy) - 1


def _draw_curves(axes: Axes, results: Results, colours: Sequence[str], *, bands: bool) -> None:
    for (_, runs), colour in zip(results, colours, strict=True):
        curves = np.array([run.accuracy for run in runs])
        axes.plot(curves.mean(0), color=colour, linewidth=1.2)
        if bands and len(runs) > 1:
            low, high = curves.min(0), curves.max(0)
            axes.fill_between(range(len(low)), low, high, color=colour, alpha=0.2, linewidth=0)


def _draw_names(axes: Axes, results: Results) -> None:
    labels = [f"{contestant.name}: {np.mean(final_accuracies(runs)):.3f}" for contestant, runs in results]
    axes.legend(axes.lines[: len(labels)], labels, **LEGEND_ABOVE)


def _draw_finals(axes: Axes, plain: Results, layca: Results) -> None:
    entries = (
        _draw_side(axes, plain, COLOURS[0], row_offset=-0.17, filled=False),
        _draw_side(axes, layca, COLOURS[1], row_offset=0.17, filled=True),
    )
    labels = [
        f"{name}: spread {spread_in_points(side):.1f} points"
        for name, side in (("torch.optim", plain), ("FusedLayca", layca))
    ]
    axes.legend(entries, labels, **LEGEND_ABOVE)
    axes.set_yticks(range(len(plain)), [contestant.base for contestant, _ in plain])
    for text, colour in zip(axes.get_yticklabels(), BASE_COLOURS, strict=True):
        text.set_color(colour)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(plain) - 0.5, -0.5)
    axes.set_xlabel("final test accuracy")


def _draw_side(
    axes: Axes, results: Results, shade: str, *, row_offset: float, filled: bool
) -> tuple[Rectangle, Line2D]:
    """Draw the finals of ``results``; returns what stands for them in a legend: the shade with a dot on it."""
    means = [float(np.mean(final_accuracies(runs))) for _, runs in results]
    span = axes.axvspan(min(means), max(means), color=shade, alpha=0.2, linewidth=0)
    for row, ((_, runs), middle, colour) in enumerate(zip(results, means, BASE_COLOURS, strict=True)):
        height, finals = row + row_offset, final_accuracies(runs)
        axes.plot([min(finals), max(finals)], [height, height], color=colour, linewidth=1.2)
        axes.plot(middle, height, color=colour, **_dot(colour, filled))
    return span, Line2D([], [], linestyle="", color="0.3", **_dot("0.3", filled))


def _dot(colour: str, filled: bool) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4, "markerfacecolor": colour if filled else "white"}


def _scale_accuracy(axes: Axes, results: Results) -> None:
    # The climb takes up most of [0, 1] and the curves part in its last few per cent: equal distances along the axis
    # are equal ratios of the error.
    axes.set_yscale("function", functions=(_height, _accuracy_at))
    best = max(max(run.accuracy) for _, runs in results for run in runs)
    top = 1 - max(0.7 * (1 - best), SMALLEST_ERROR)
    axes.set_ylim(0, top)
    ticks = [tick for tick in ACCURACY_TICKS if tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylabel("test accuracy (log of the error)")


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


def _name_drops(axes: Axes, epochs: int, *, at_the_top: bool) -> None:
    for drop in drop_epochs(epochs):
        axes.annotate(
            f"lr × {DROP_FACTOR}",
            (drop, 1 if at_the_top else 0),
            xycoords=("data", "axes fraction"),
            xytext=(-1.5, 0 if at_the_top else 2),
            textcoords="offset points",
            ha="right",
            va="top" if at_the_top else "bottom",
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
