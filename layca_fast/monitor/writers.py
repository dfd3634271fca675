"""Where rotation curves go beside the monitor: CSV, JSON lines, TensorBoard.

Each writer has ``write(monitor)``, which adds the records since its last call, and so waits for the device. The first
call writes all records that the monitor has, those from before a resume included, over what the file held. Of several
processes that train together, one should write. What a call could not write, as on a full disk, the next one does;
OSError then names the file.
"""

import csv
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import StringIO
from os import SEEK_END
from pathlib import Path
from typing import Any, Protocol, TextIO

from ..formulas.options import check_choice
from . import RotationMonitor
from .curves import QUANTITIES, Curves, drawing
from .files import replace


class Writer(Protocol):
    """What the callbacks want of a writer."""

    def write(self, source: RotationMonitor | Curves) -> None:
        """Add the records of ``source`` since the last call."""


class _Incremental:
    """Remembers up to which record it has written."""

    def __init__(self) -> None:
        self._last: Curves | None = None

    def _news(self, source: RotationMonitor | Curves) -> tuple[Curves, bool]:
        """All curves, or those of later steps than were written; and whether these go on from what was written."""
        curves = source if isinstance(source, Curves) else source.curves
        # Another monitor, or one that was reset or went back to a checkpoint, starts the file anew: it may well have
        # come to the same step by now.
        goes_on = self._last is not None and curves.include(self._last)
        news = curves.after(self._last.steps[-1]) if goes_on and self._last is not None else curves
        return news, goes_on

    def _wrote(self, source: RotationMonitor | Curves) -> None:
        """All records have been written: what is not seen here is written once more."""
        curves = source if isinstance(source, Curves) else source.curves
        self._last = curves.after(curves.steps[-2]) if len(curves.steps) > 1 else curves


class _FileWriter(_Incremental, ABC):
    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        if self.path.is_dir() or not self.path.absolute().parent.is_dir():
            raise ValueError(f"path={str(path)!r}: must be a file in a folder that exists")

        #: Of the file as it was left, in bytes; and whether more than that may be a part of what could not be written.
        self._size, self._is_torn = 0, False

    def write(self, source: RotationMonitor | Curves) -> None:
        curves = source if isinstance(source, Curves) else source.curves
        news, goes_on = self._news(curves)
        try:
            # Somebody may have moved the file away.
            if goes_on and self.path.is_file() and self.path.stat().st_size >= self._size:
                self._add(self._text(news, new=False))
            else:
                replace(self.path, self._text(curves, new=True))
            self._size, self._is_torn = self.path.stat().st_size, False
        except OSError as error:
            since = f" (rotation records from step {news.steps[0]} on were not written)" if news.steps else ""
            raise OSError(error.errno, f"{error.strerror or error}{since}", str(self.path)) from error
        self._wrote(curves)

    def _text(self, curves: Curves, new: bool) -> bytes:
        text = StringIO(newline="")
        self._append(text, curves, new)
        return text.getvalue().encode("utf-8")

    def _add(self, data: bytes) -> None:
        with self.path.open("r+b") as file:
            if self._is_torn:
                file.truncate(self._size)
            self._size, self._is_torn = file.seek(0, SEEK_END), True
            file.write(data)

    @abstractmethod
    def _append(self, file: TextIO, curves: Curves, new: bool) -> None:
        """Write the curves to the end of a file, which is empty where ``new``."""


class CsvWriter(_FileWriter):
    """A CSV file with a line for each step and layer: step, layer, rotation, angle, norm. ``nan``: not defined."""

    def _append(self, file: TextIO, curves: Curves, new: bool) -> None:
        lines = csv.writer(file)
        if new:
            lines.writerow(["step", "layer", *QUANTITIES])
        for row, step in enumerate(curves.steps):
            values = zip(*(getattr(curves, name)[row].tolist() for name in QUANTITIES), strict=True)
            lines.writerows([step, name, *numbers] for name, numbers in zip(curves.names, values, strict=True))


class JsonLinesWriter(_FileWriter):
    """A file with a JSON object per step: ``{"step": 10, "rotation": {"conv1.weight": 0.02, ...}, "norm": {...}}``.

    ``angle`` is there with ``per_step=True``. What is not finite is ``null``: JSON has no word for it.
    """

    def _append(self, file: TextIO, curves: Curves, new: bool) -> None:
        for record in curves.records():
            json.dump(_without_nan(record), file, allow_nan=False)
            file.write("\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoardWriter(_Incremental):
    """Curves as scalars, ``rotation/<layer>`` at each step, and the figure of all at the last.

    Args:
        target: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar`` and ``add_figure``; or
            the folder for a new one, which :meth:`close` closes. A resumed run writes its past to that folder once
            more, with the same numbers.
        quantities: what becomes scalars: "rotation", "angle", "norm".
        figure: whether to draw; needs matplotlib.
    """

    def __init__(self, target: Any, quantities: Sequence[str] = ("rotation",), figure: bool = True) -> None:
        super().__init__()
        for name in quantities:
            check_choice({"quantities": name}, "quantities", QUANTITIES)
        self._quantities = tuple(quantities)
        self._figure = figure
        if figure:
            # Missing, it is missed now, and not by the first write of a training.
            drawing()
        self._is_ours = isinstance(target, (str, Path))
        if self._is_ours:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    f"a new SummaryWriter needs tensorboard ({error}): pip install tensorboard"
                ) from error
            target = SummaryWriter(str(target))
        self._target = target

    def write(self, source: RotationMonitor | Curves) -> None:
        curves = source if isinstance(source, Curves) else source.curves
        news, _ = self._news(curves)
        for record in news.records():
            for quantity in self._quantities:
                for name, value in record.get(quantity, {}).items():
                    self._target.add_scalar(f"{quantity}/{name}", value, record["step"])
        self._wrote(curves)
        if self._figure and news.steps:
            self._target.add_figure("layer rotation", curves.plot(), news.steps[-1], close=False)

    def close(self) -> None:
        """Close the SummaryWriter that was made here; one that was passed in stays open."""
        if self._is_ours:
            self._target.close()
