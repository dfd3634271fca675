"""CSV files of trainings: each row is a dataclass, and is appended as it comes: what is cut off has lost nothing."""

import csv
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

import layca_fast

Row = TypeVar("Row")

#: How a cell becomes a value, where the type itself does not do it.
_PARSERS = {bool: lambda cell: cell == "True"}


def read(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a CSV, each a ``kind`` (a dataclass); none where there is no file."""
    if not path.exists():
        return []
    # Every row is a dataclass, which no type of Python's says of a class.
    types: dict[str, Any] = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    with path.open(newline="") as file:
        return [
            kind(**{name: _PARSERS.get(each, each)(row[name]) for name, each in types.items()})
            for row in csv.DictReader(file)
        ]


def append(path: Path, row: Any) -> None:
    """One row (a dataclass) more, under a head if it is the first."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


def made_with() -> dict[str, str]:
    """Columns that say when and with what."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
    return {"date": date, "layca_fast": layca_fast.__version__, "torch": torch.__version__}
