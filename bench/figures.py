"""The pictures of ``python -m bench.plot`` and ``python -m bench.scaling``, drawn from rows by matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from layca_fast.figures.style import STYLE

from .rows import Row, latest, shortened
from .runner import COPY

#: The package's, with smaller ticks, and SVG files that are the same at every run.
BENCH_STYLE: Mapping[Any, Any] = {
    **STYLE,
    "axes.titlesize": 8.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7,
    "svg.fonttype": "none",
    "svg.hashsalt": "layca_fast",
}

WIDTH, DPI = 9.0, 200

OURS, ATTACHED, BY_HAND, OTHERS, YARDSTICK = "#c4402f", "#e3a197", "#7f9fc0", "0.75", "0.35"

#: Line and marker of the colours that the scaling picture has.
LINES = {OURS: ("-", "o"), YARDSTICK: ("-", "s")}


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=DPI, metadata=metadata, facecolor="white")


def _colour(row: Row) -> str:
    if row.provider == row.yardstick:
        return YARDSTICK
    kinds = {"FusedLayca": OURS, "attach": ATTACHED, "Layca by hand": BY_HAND}
    return next((colour for start, colour in kinds.items() if row.provider.startswith(start)), OTHERS)


def _short(reason: str, length: int = 34) -> str:
    return reason if len(reason) <= length else reason[: length - 1].rsplit(" ", 1)[0] + " …"


def _bars(axes: Axes, model: str, names: Sequence[str], rows: Mapping[str, Row], limits: tuple[float, float]) -> None:
    """One panel: a bar from 1 to each ratio, its value at the end, and a whisker over the rounds' quartiles."""
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.axvline(1, color=YARDSTICK, linewidth=0.6)
    for place, name in enumerate(names):
        row = rows.get(name)
        if row is None or row.ratio_median is None or row.ratio_q1 is None or row.ratio_q3 is None:
            why = "not measured" if row is None else f"not run: {_short(row.skipped)}"
            axes.text(1.05, place, why, va="center", fontsize=5.5, color="0.5", style="italic")
            continue
        axes.barh(place, row.ratio_median - limits[0], left=limits[0], height=0.72, color=_colour(row))
        axes.plot([row.ratio_q1, row.ratio_q3], [place, place], color="black", linewidth=0.8)
        weight = "bold" if _colour(row) == OURS else "normal"
        end = max(row.ratio_median, row.ratio_q3) * 1.06
        value = f"{row.ratio_median:.2f}" if row.ratio_median < 10 else f"{row.ratio_median:.1f}"
        axes.text(end, place, value, va="center", fontsize=7, weight=weight)
    one = next(iter(rows.values()))
    axes.set_title(f"{model}\n{one.tensors:,} tensors, {one.parameters / 1e6:.4g} M weights")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if limits[1] < 100 * limits[0] else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", length=0)


def _where(row: Row) -> str:
    """The device and the versions that the rows come from."""
    device = row.cpu if row.device == "CPU" else row.device
    return f"{device}, {row.threads} threads, torch {row.torch}, {row.dtype}, {row.date[:10]}"


def save_ratios(path: Path, rows: Sequence[Row], base: str, models: Sequence[str]) -> None:
    """Draw the step times of ``base`` over the yardstick's, a panel for each of ``models``, slowest at the bottom.

    Raises ValueError if there is nothing to draw.
    """
    columns = {model: latest(rows, base, model) for model in models}
    ran = {name for column in columns.values() for name, row in column.items() if row.ratio_median is not None} - {COPY}
    if not ran:
        raise ValueError(f"no row of base {base!r} has times for the models {list(models)}")
    columns = {model: column for model, column in columns.items() if column}
    one = next(row for column in columns.values() for row in column.values() if row.provider in ran)

    def geometric(name: str) -> float:
        ratios = [
            row.ratio_median
            for column in columns.values()
            if (row := column.get(name)) and row.ratio_median is not None
        ]
        product = 1.0
        for ratio in ratios:
            product *= ratio
        return product ** (1 / len(ratios))

    names = sorted(ran, key=geometric)
    edges = [
        value
        for column in columns.values()
        for name in names
        if (row := column.get(name))
        and row.ratio_q1 is not None
        and row.ratio_q3 is not None
        and row.ratio_median is not None
        for value in (row.ratio_median, row.ratio_q1, row.ratio_q3)
    ]
    limits = (0.7 * min(*edges, 1.0), 2.2 * max(edges))
    with matplotlib.rc_context(dict(BENCH_STYLE)):
        figure = Figure(figsize=(WIDTH, 1.15 + 0.185 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, (model, column) in zip(panels, columns.items(), strict=True):
            _bars(axes, model, names, column, limits)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        for label, name in zip(panels[0].get_yticklabels(), names, strict=True):
            if name.startswith("FusedLayca"):
                label.set_color(OURS)
                label.set_weight("bold")
        figure.supxlabel(
            f"time per step over that of torch's {one.yardstick}, base {base} (log scale; black: quartiles)   "
            "red: layca_fast, blue: Layca by hand, grey: other optimizers\n"
            f"{_where(one)}",
            fontsize=7.5,
        )
        _save(figure, path)


def _lines(axes: Axes, rows: Sequence[Row], column: str, label: str) -> None:
    """Microseconds per step against one column, a line per provider."""
    for name in dict.fromkeys(row.provider for row in rows):
        points = [row for row in rows if row.provider == name and row.median_ms is not None]
        if not points:
            continue
        colour, line, marker = (_colour(points[0]), *LINES.get(_colour(points[0]), ("-", "^")))
        if name == COPY:
            colour, line, marker = "0.6", ":", "."
        where = [getattr(row, column) for row in points]
        times, firsts, thirds = (
            [1e3 * getattr(row, field) * shortened(row) for row in points] for field in ("median_ms", "q1_ms", "q3_ms")
        )
        axes.plot(where, times, line, marker=marker, markersize=3, linewidth=1.2, color=colour, label=name)
        axes.fill_between(where, firsts, thirds, color=colour, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.grid(which="major", color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def save_scaling(path: Path, by_weights: Sequence[Row], by_tensors: Sequence[Row]) -> None:
    """Draw time per step against the number of weights and against the number of tensors, as measured.

    Raises ValueError if a sweep has no times.
    """
    for name, rows in (("weights", by_weights), ("tensors", by_tensors)):
        if not any(row.median_ms is not None for row in rows):
            raise ValueError(f"no row has times for the sweep over the number of {name}")
    with matplotlib.rc_context(dict(BENCH_STYLE)):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        _lines(left, by_weights, "parameters", "weights")
        _lines(right, by_tensors, "tensors", "tensors")
        left.set_ylabel("µs per step")
        left.set_title(f"{by_weights[0].tensors} tensors")
        right.set_title(f"{by_tensors[0].parameters / 1e6:g} M weights in equal tensors")
        left.legend()
        figure.supxlabel(f"base {by_weights[0].base}; bands: quartiles. {_where(by_weights[0])}", fontsize=7.5)
        _save(figure, path)
