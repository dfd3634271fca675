"""Rotation curves from the files that hold them: what is no whole record is an error that tells its line."""

import csv
import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .curves import QUANTITIES, Curves

#: Of what a line holds, in a message.
LONGEST_QUOTE = 60

#: A step beyond this is none, and would not fit where steps are drawn.
MOST_STEPS = 2**63


class _Table:
    """Numbers by step, layer and quantity, in 8 bytes each."""

    def __init__(self) -> None:
        self.columns: dict[str, int] = {}
        self.rows: dict[int, array[float]] = {}

    def row(self, step: int) -> "array[float]":
        return self.rows.setdefault(step, array("d"))

    def put(self, row: "array[float]", layer: str, first: int, numbers: "list[float]") -> None:
        """Write the numbers of a layer, from the quantity ``first`` on."""
        start = self.columns.setdefault(layer, len(self.columns)) * len(QUANTITIES) + first
        if len(row) < start + len(numbers):
            row.extend([math.nan] * (len(self.columns) * len(QUANTITIES) - len(row)))
        row[start : start + len(numbers)] = array("d", numbers)

    def curves(self) -> Curves:
        width = len(self.columns) * len(QUANTITIES)
        for row in self.rows.values():
            row.extend([math.nan] * (width - len(row)))
        numbers = torch.tensor(0.0, dtype=torch.float64, device="cpu").new_empty(len(self.rows), width)
        for index, row in enumerate(self.rows.values()):
            if width:
                numbers[index] = torch.frombuffer(row, dtype=torch.float64)
        shape = len(self.rows), len(self.columns), len(QUANTITIES)
        tensors = dict(zip(QUANTITIES, (each.clone() for each in numbers.view(shape).unbind(2)), strict=True))
        return Curves(list(self.columns), list(self.rows), **tensors)


def _step(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST_STEPS:
        raise ValueError(f"step {_quoted(value)} is no whole number >= 0")
    return value


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{_quoted(value)} is no number")
    return float(value)


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}…"


def _whole_lines(path: Path) -> Iterator[str]:
    """The lines that have an end, with it: a run that was killed, or is still writing, may leave a part of one."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            if line.endswith("\n"):
                yield line


def _put_json(table: _Table, line: str) -> None:
    record = json.loads(line)
    if not isinstance(record, dict) or "step" not in record or "rotation" not in record:
        raise ValueError(f"{_quoted(line.strip())} is no record: an object with step and rotation is expected")
    row = table.row(_step(record["step"]))
    for first, name in enumerate(QUANTITIES):
        values = record.get(name, {})
        if not isinstance(values, dict):
            raise ValueError(f"{name} {_quoted(values)} is no object with a number for each layer")
        for layer, value in values.items():
            table.put(row, layer, first, [_number(value)])


def _read_json_lines(path: Path, table: _Table, at: Callable[[int], None]) -> None:
    for number, line in enumerate(_whole_lines(path), 1):
        at(number)
        if line.strip():
            _put_json(table, line)


def _read_csv(path: Path, table: _Table, at: Callable[[int], None]) -> None:
    end, end_of_header = "", ""

    def noting_ends() -> Iterator[str]:
        nonlocal end
        for line in _whole_lines(path):
            end = line[-2:] if line.endswith("\r\n") else "\n"
            yield line

    lines = csv.reader(noting_ends(), strict=True)
    places: Mapping[str, int] | None = None
    while True:
        at(lines.line_num + 1)
        cells = next(lines, None)
        if cells is None:
            return
        if not cells:
            continue
        if places is None:
            end_of_header = end
            places = {name: place for place, name in enumerate(cells)}
            lacking = {"step", "layer", *QUANTITIES}.difference(places)
            if lacking:
                raise ValueError(f"there are no columns {sorted(lacking)}")
            width, order = len(cells), [places[name] for name in QUANTITIES]
        elif end != end_of_header:
            # What is left of a number that was cut is a number.
            raise ValueError(f"it ends with {end!r}, and the header with {end_of_header!r}: it was cut or edited")
        elif len(cells) != width:
            raise ValueError(f"{len(cells)} cells where there are {width} columns: {_quoted(','.join(cells))}")
        else:
            row = table.row(_step(int(cells[places["step"]])))
            numbers = [float(cells[place]) if cells[place] else math.nan for place in order]
            table.put(row, cells[places["layer"]], 0, numbers)


def read_curves(path: str | Path) -> Curves:
    """The curves in a file that CsvWriter (``.csv``) or JsonLinesWriter (anything else) wrote.

    A last line without an end, as a run leaves it that is killed while it writes, is left out. Memory: about 30 bytes a
    number.

    Raises ValueError, naming the file and the line, where that holds something else, as a line does that was cut in the
    middle; and OSError where the file cannot be read.
    """
    path, table, line = Path(path), _Table(), 0

    def at(number: int) -> None:
        nonlocal line
        line = number

    try:
        (_read_csv if path.suffix.lower() == ".csv" else _read_json_lines)(path, table, at)
    except json.JSONDecodeError as error:
        raise _no_curves(path, line, f"{error.msg} at character {error.pos + 1}") from error
    except (csv.Error, ValueError, OverflowError, RecursionError) as error:
        raise _no_curves(path, line, str(error)) from error
    if not table.rows:
        raise ValueError(f"{path}: holds no records")
    return table.curves()


def _no_curves(path: Path, line: int, why: str) -> ValueError:
    return ValueError(
        f"{path}: holds no rotation curves: CSV (.csv) or JSON lines of layca_fast.writers are expected "
        f"(line {line}: {why})"
    )
