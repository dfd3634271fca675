"""One row per measurement: what it holds, and how it is written to a CSV file and read back."""

import csv
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from layca_fast import __version__

from .runner import COPY


@dataclass(frozen=True)
class Row:
    """A provider on a model. Times are milliseconds per step; where ``skipped`` says why there are none, they are None.

    ``ratio_median`` and its quartiles are those of the rounds' own ratios to ``yardstick``: :func:`round_ratios`.
    ``gb_per_s`` is bytes moved (``bytes_per_parameter``: see bench/providers.py) over the median, and ``copy_fraction``
    its ratio to the same of a copy timed in the same rounds. ``tensors`` and ``parameters`` are the model's.
    """

    date: str
    model: str
    tensors: int
    parameters: int
    base: str
    dtype: str
    provider: str
    median_ms: float | None
    q1_ms: float | None
    q3_ms: float | None
    rounds: int
    yardstick: str
    ratio_median: float | None
    ratio_q1: float | None
    ratio_q3: float | None
    bytes_per_parameter: float | None
    gb_per_s: float | None
    copy_fraction: float | None
    skipped: str
    device: str
    cpu: str
    threads: int
    system: str
    python: str
    torch: str
    layca_fast: str
    package: str


def shortened(row: Row) -> float:
    """By what to multiply the times of a row: a copy of many weights is timed on a part of them."""
    if row.provider != COPY or row.gb_per_s is None or row.median_ms is None or row.bytes_per_parameter is None:
        return 1.0
    return row.parameters / (row.gb_per_s * 1e6 * row.median_ms / row.bytes_per_parameter)


def cpu_model() -> str:
    """The processor's name, or what the system gives for one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, str | int]:
    """The columns that say where and with what a measurement ran."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "layca_fast": __version__,
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, middle, third = statistics.quantiles(values, method="inclusive")
    return first, middle, third


def round_ratios(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of the ratios that two steps had in each round: the one definition.

    Not the quotient of two medians, which may come from different rounds, and lie outside of these quartiles.
    """
    return quartiles([ours / theirs for ours, theirs in zip(over, under, strict=True)])


def write(path: Path, rows: Iterable[Any], kind: Any = Row) -> None:
    """Write ``rows``, dataclasses of one ``kind``, to a new CSV file, numbers to five digits."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = asdict(row).items()
            writer.writerow({name: f"{cell:.5g}" if isinstance(cell, float) else cell for name, cell in cells})


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; ValueError naming what is missing or unknown if its columns are others."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        known, found = {field.name for field in fields(Row)}, set(reader.fieldnames or ())
        if found - known == {"ratio"}:
            raise ValueError(
                f"{path.name} is of a time when a ratio was the quotient of two medians. The median of the rounds' own "
                "ratios cannot be had from it: measure again with the command that wrote it"
            )
        if known != found:
            raise ValueError(f"{path.name}: missing columns {sorted(known - found)}, unknown {sorted(found - known)}")
        return [Row(**{field.name: _parsed(field.type, line[field.name]) for field in fields(Row)}) for line in reader]


def _parsed(kind: object, text: str) -> str | int | float | None:
    if kind is str:
        return text
    if kind is int:
        return int(text)
    return float(text) if text else None


def latest(rows: Iterable[Row], base: str, model: str) -> dict[str, Row]:
    """The last row of each provider for ``base`` and ``model``, by provider, in the order of the file."""
    return {row.provider: row for row in rows if (row.base, row.model) == (base, model)}
