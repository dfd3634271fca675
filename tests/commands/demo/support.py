"""What the tests of the demo share: what its printed table and its picture hold."""

import re
import struct
from pathlib import Path

import matplotlib.image

from layca_fast.commands.demo import figure as demo_figure
from layca_fast.figures import style as figure_style


def table_rows(printed: str) -> dict[str, list[str]]:
    """The cells of the lines from the table's title on, by the first; the progress bars above name optimizers, too."""
    _, table = printed.split("\nAfter ", 1)
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return {row[0]: row for row in rows}


def check_png(path: Path) -> None:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == tuple(round(inches * figure_style.DPI) for inches in demo_figure.SIZE)
    pixels = matplotlib.image.imread(path).reshape(-1, 4)
    blank = float((pixels == 1).all(1).mean())
    assert 0.5 < blank < 0.98, "a figure is mostly paper, but not only"
