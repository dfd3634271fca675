"""Layer rotation curves as the paper draws them: a line per layer, viridis from the first to the last."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from ..monitor.curves import QUANTITIES, Curves
from .style import new_figure

#: Inches.
SIZE = (5.4, 2.7)

#: More lines than this get a colour bar: nobody tells as many colours apart, or reads as many names.
MOST_NAMED = 12

#: Longer names lose their middle.
LONGEST_NAME = 30

#: Curves that stay below this get an axis of their own length.
SHORT = 0.5
#: Columns that a line is thinned to: more than the axes have pixels at the resolution of files.
COLUMNS = 2000

LABELS = {
    "rotation": r"layer rotation, $1-\cos(w_t, w_0)$",
    "angle": "rotation between records (rad)",
    "norm": "norm of the weights",
}


def _shared(rows: Sequence[Sequence[str]]) -> int:
    """How many entries all rows begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def short_names(names: Sequence[str]) -> list[str]:
    """The names without the parts, between dots, that all of them begin or end with, and not too long."""
    parts = [name.split(".") for name in names]
    spare = min(len(each) for each in parts) - 1 if len(parts) > 1 else 0
    ahead = min(_shared(parts), spare)
    behind = min(_shared([each[::-1] for each in parts]), spare - ahead)
    if ahead and any(each[ahead][:1].isdigit() for each in parts):
        # A bare number would be read as a position.
        ahead -= 1
    kept = [".".join(each[ahead : len(each) - behind]) for each in parts]
    half = LONGEST_NAME // 2 - 1
    return [name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}" for name in kept]


def draw(
    curves: Curves, path: str | Path | None = None, *, quantity: str = "rotation", title: str = "", xlabel: str = "step"
) -> Figure:
    """Draw one quantity of all layers, and write it to ``path`` (PNG, PDF or SVG by its suffix) if that is given.

    ``quantity``: "rotation", from 0 to 1, or as far as it goes where that is beyond 1 or below 1/2; "angle", radians on
    a logarithmic scale; or "norm", the same.

    Up to 12 layers are named beside the lines; more have a colour bar. pyplot knows nothing of the figure.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity={quantity!r} is unknown: choose one of {list(QUANTITIES)}")
    if not curves.steps:
        raise ValueError("there are no records to draw")
    if quantity == "angle" and not curves.has_angles:
        raise ValueError("there are no angles between records: make the monitor with per_step=True")
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 1, len(curves.names))))
    with new_figure(SIZE, None if path is None else Path(path)) as figure:
        axes = figure.subplots()
        few = len(curves.names) <= MOST_NAMED
        _draw_lines(axes, curves, quantity, colours, width=1.3 if few else max(0.45, 10 / len(curves.names)))
        axes.set_ylabel(LABELS[quantity])
        _scale(axes, curves, quantity)
        axes.set_xlabel(xlabel)
        axes.set_title(title)
        if few:
            _name_lines(axes, curves, colours)
        else:
            _draw_layer_scale(figure, axes, curves, colours)
    return figure


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What can be seen of a line: (points,) each. In every column its first, lowest, highest and last point.

    Few points stay as they are, and so do gaps (NaN) that are wider than a column.
    """
    if len(steps) <= 4 * COLUMNS or not np.all(steps[1:] > steps[:-1]):
        return steps, values
    columns = (steps - steps[0]) * (COLUMNS / (steps[-1] - steps[0]))
    starts = np.flatnonzero(np.diff(np.minimum(columns, COLUMNS - 1).astype(np.int64), prepend=-1))
    ends = np.append(starts[1:], len(steps)) - 1
    with np.errstate(invalid="ignore"):
        lowest, highest = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
    middle = (steps[starts] + steps[ends]) / 2
    x = np.stack([steps[starts], middle, middle, steps[ends]], axis=1)
    y = np.stack([values[starts], lowest, highest, values[ends]], axis=1)
    return x.ravel(), y.ravel()


def _draw_lines(axes: Axes, curves: Curves, quantity: str, colours: ListedColormap, width: float) -> None:
    steps = np.array(curves.steps, dtype=float)
    points = [np.stack(thinned(steps, values), axis=1) for values in getattr(curves, quantity).numpy().T]
    lines = LineCollection(points, colors=colours(np.arange(colours.N)), linewidths=width)
    axes.add_collection(lines)
    if len(curves.steps) == 1:
        # A line through one point shows nothing.
        x, y = np.concatenate(points).T
        axes.scatter(x, y, c=colours(np.arange(colours.N)), s=8)


def _scale(axes: Axes, curves: Curves, quantity: str) -> None:
    first, last = curves.steps[0], curves.steps[-1]
    axes.set_xlim(first, last if last > first else first + 1)
    values = getattr(curves, quantity).numpy()
    values = values[np.isfinite(values)]
    if quantity == "rotation":
        highest = values.max(initial=0.0)
        # A short run would be a flat line on the axis to 1; and a run that went nowhere must not look like a long one.
        if 0 < highest < SHORT:
            axes.set_ylabel(f"{LABELS[quantity]}\n(the axis ends at {1.05 * highest:.2g}, not at 1)")
            axes.set_ylim(0, 1.05 * highest)
        else:
            axes.set_ylim(0, max(1.0, 1.02 * highest))
        return
    axes.set_yscale("log")
    if quantity == "norm":
        # As plain numbers: norms are rarely far from 1.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    positive = values[values > 0]
    if len(positive):
        axes.set_ylim(positive.min() / 1.3, positive.max() * 1.3)


def _name_lines(axes: Axes, curves: Curves, colours: ListedColormap) -> None:
    entries = [axes.plot([], [], color=colours(layer), linewidth=2.5)[0] for layer in range(colours.N)]
    legend = axes.legend(
        entries,
        short_names(curves.names),
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        borderaxespad=0,
        handlelength=1,
        labelspacing=0.35,
        fontsize=7,
    )
    for text in legend.get_texts():
        # A name is no formula, whatever dollars it has.
        text.set_parse_math(False)


def _draw_layer_scale(figure: Figure, axes: Axes, curves: Curves, colours: ListedColormap) -> None:
    scale = ScalarMappable(BoundaryNorm(np.arange(colours.N + 1) + 0.5, colours.N), colours)
    ticks = np.unique(np.linspace(1, colours.N, 5).round().astype(int))
    bar = figure.colorbar(scale, ax=axes, ticks=ticks, aspect=28, pad=0.02)
    bar.minorticks_off()
    names = short_names(curves.names)
    bar.set_ticklabels([f"{tick}: {names[tick - 1]}" for tick in ticks])
    for text in bar.ax.get_yticklabels():
        text.set_parse_math(False)
    # Small layers at the top, as one reads; the first layer is where the data comes in.
    bar.ax.invert_yaxis()
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.ax.set_title("layer", fontsize=7, loc="left")
