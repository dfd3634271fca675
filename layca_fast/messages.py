"""What the package says to people: what to call a parameter, tables of plain text, warnings at the user's own line."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

#: Packages whose frames are not the user's: schedulers, GradScaler and profiling all wrap a step.
INSIDE = {"torch", "layca_fast"}


def warn_caller(message: str) -> None:
    """Issue a UserWarning at the first frame outside of torch and of this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def labelled(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], str, Tensor]]:
    """Every parameter with its group and what to call it in a message: its name, if the group knows it."""
    for number, group in enumerate(groups):
        names = group.get("param_names") or ()
        for index, param in enumerate(group["params"]):
            # Someone may have appended to the parameters of a group with names.
            label = f"parameter {names[index]!r}" if index < len(names) else f"parameter {index} of group {number}"
            yield group, label, param


def named(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], str, Tensor]]:
    """Every parameter with its group and its name: "group.index", their numbers, where the group does not know one."""
    for number, group in enumerate(groups):
        names = group.get("param_names") or ()
        for index, param in enumerate(group["params"]):
            yield group, names[index] if index < len(names) else f"{number}.{index}", param


def describe(label: str, tensor: Tensor) -> str:
    """A parameter in an error message: its label, shape and dtype."""
    return f"{label} (shape {tuple(tensor.shape)}, {tensor.dtype})"


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text, columns two spaces apart."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (columns, *rows)
    ]
    return "\n".join(lines)
