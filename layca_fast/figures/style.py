"""How the package's figures look: matplotlib settings that hold while one is drawn, and for nothing else."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: In files, and in what draws a figure itself, such as TensorBoard.
DPI, SCREEN_DPI = 300, 200

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


@contextmanager
def new_figure(size: tuple[float, float], path: Path | None) -> Iterator[Figure]:
    """A figure of ``size`` inches to draw on, written to ``path`` at the end: PNG, PDF or SVG by its suffix.

    Neither pyplot's figures nor matplotlib's settings are touched.
    """
    with matplotlib.rc_context(dict(STYLE)):
        figure = Figure(figsize=size, dpi=SCREEN_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        if path is not None:
            figure.savefig(path, dpi=DPI)
