"""Whatever a file of curves holds, it is read right or with one clear error; long runs are drawn from few points."""

import json
import math
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layca_fast import Curves, __main__
from layca_fast.figures.rotation import COLUMNS, thinned
from layca_fast.monitor.reading import read_curves
from layca_fast.monitor.writers import CsvWriter, JsonLinesWriter

from ..support import same_bits

FILES = {".csv": CsvWriter, ".jsonl": JsonLinesWriter}
every_file = pytest.mark.parametrize("suffix", FILES)


def curves_of(steps: int, names: tuple[str, ...] = ("conv1.weight", 'a,"b"')) -> Curves:
    shape = steps, len(names)
    rotation = torch.rand(shape, dtype=torch.float64)
    return Curves(list(names), list(range(steps)), rotation, rotation + 1, rotation + 2)


def written(path: Path, curves: Curves) -> list[bytes]:
    """A file of its lines, which have their ends."""
    FILES[path.suffix](path).write(curves)
    return path.read_bytes().splitlines(keepends=True)


@every_file
def test_a_line_that_was_cut_in_the_middle_is_an_error_with_its_number(suffix: str, tmp_path: Path, seed: int) -> None:
    """At any place but within its first number, followed by the next line or an end of its own."""
    path = tmp_path / f"run{suffix}"
    lines = written(path, curves_of(5))
    chance = random.Random(seed)
    first = 1 if suffix == ".csv" else 0
    for trial in range(100):
        index = chance.randrange(first, len(lines) - 1)
        body = lines[index].rstrip(b"\r\n")
        # A step's digits before another step's are a number, too.
        first_cut = body.find(b",") + 1 if suffix == ".csv" else 1
        cut = body[: chance.randrange(first_cut, len(body))]
        own_end = bool(trial % 2)
        torn = [*lines[:index], cut + (b"\n" if own_end else b""), *lines[index + 1 :]]
        path.write_bytes(b"".join(torn))
        with pytest.raises(ValueError, match=rf"run{suffix}: holds no rotation curves.*line {index + 1}: "):
            read_curves(path)


def line(**changes: Any) -> str:
    record = {"step": 1, "rotation": {"w": 0.5}, "norm": {"w": 1.0}, **changes}
    return json.dumps({name: value for name, value in record.items() if value is not None}) + "\n"


HEAD = "step,layer,rotation,angle,norm\n"
GOOD = {".csv": HEAD + "0,w,0.5,nan,1.0\n", ".jsonl": line(step=0)}
BAD: dict[str, tuple[str, str]] = {
    "CSV field without an end": (".csv", '1,"w,0.5,nan,1\n'),
    "CSV field beyond the limit": (".csv", f"1,{'w' * 200_000},0.5,nan,1\n"),
    "CSV with a zero byte": (".csv", "1\0,w,0.5,nan,1\n"),
    "CSV with text for a number": (".csv", "1,w,half,nan,1\n"),
    "CSV with a fractional step": (".csv", "1.5,w,0.5,nan,1\n"),
    "CSV with a negative step": (".csv", "-1,w,0.5,nan,1\n"),
    "CSV with an endless step": (".csv", f"{'9' * 400},w,0.5,nan,1\n"),
    "CSV with more digits than Python reads": (".csv", f"{'9' * 5000},w,0.5,nan,1\n"),
    "CSV with a header twice": (".csv", HEAD),
    "CSV with too few cells": (".csv", "1,w,0.5\n"),
    "CSV with too many cells": (".csv", "1,w,0.5,nan,1,2\n"),
    "JSON with an infinite step": (".jsonl", '{"step": 1e999, "rotation": {"w": 1}}\n'),
    "JSON with an endless step": (".jsonl", line(step=10**400)),
    "JSON with an endless number": (".jsonl", line(rotation={"w": 10**400})),
    "JSON that is nested too deeply": (".jsonl", "[" * 200_000 + "\n"),
    "JSON object that is nested too deeply": (".jsonl", '{"a":' * 200_000 + "\n"),
    "JSON list": (".jsonl", "[1, 2]\n"),
    "JSON number": (".jsonl", "3\n"),
    "JSON with a fractional step": (".jsonl", line(step=1.5)),
    "JSON with a truth for a step": (".jsonl", line(step=True)),
    "JSON with text for a step": (".jsonl", line(step="1")),
    "JSON without rotation": (".jsonl", line(rotation=None)),
    "JSON with text for a number": (".jsonl", line(rotation={"w": "0.5"})),
    "JSON with a list for a number": (".jsonl", line(norm={"w": [1]})),
    "JSON with a number for layers": (".jsonl", line(norm=5)),
    "JSON cut": (".jsonl", '{"step": 1, "rotat\n'),
}


@pytest.mark.parametrize(("suffix", "text"), BAD.values(), ids=BAD.keys())
def test_plot_ends_in_one_clear_line(
    suffix: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_text(GOOD[suffix] + text + GOOD[suffix].splitlines()[-1] + "\n", encoding="utf-8")
    number = GOOD[suffix].count("\n") + 1
    assert __main__.main(["plot", str(path)]) == 1
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"{path}: holds no rotation curves")
    assert f"(line {number}: " in printed
    assert len(printed) < 400
    assert not path.with_suffix(".png").exists()


@every_file
def test_bytes_at_random_never_get_through(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    """Of a good file, some replaced, taken out or doubled."""
    path, chance = tmp_path / f"run{suffix}", random.Random(seed)
    whole = b"".join(written(path, curves_of(3)))
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(3)] = bytes(chance.randrange(256) for _ in range(chance.randrange(3)))
        path.write_bytes(data)
        with suppress(ValueError):
            read_curves(path)
    path.write_bytes(bytes(chance.randrange(256) for _ in range(1000)) + b"\n")
    assert __main__.main(["plot", str(path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_names_with_dollars_are_no_formulas(tmp_path: Path, seed: int) -> None:
    for count in (2, 20):
        curves_of(3, tuple(rf"$\broken{{ {i} $" for i in range(count))).plot(tmp_path / "run.png")


@every_file
def test_what_is_missing_or_not_finite_is_read_as_it_was(suffix: str, tmp_path: Path, seed: int) -> None:
    curves = curves_of(4)
    curves.rotation[2, 1] = math.nan
    written(tmp_path / f"run{suffix}", curves)
    found = read_curves(tmp_path / f"run{suffix}")
    assert same_bits(found.rotation.nan_to_num(nan=-1.0), curves.rotation.nan_to_num(nan=-1.0))
    assert (found.names, found.steps) == (curves.names, curves.steps)


def test_thinning_keeps_what_can_be_seen(seed: int) -> None:
    """Of every column the first, lowest, highest and last value, gaps included; few points, and their order."""
    steps = np.cumsum(np.random.default_rng(seed).integers(1, 4, 100_000)).astype(float)
    values = np.random.default_rng(seed + 1).normal(size=len(steps))
    values[40_000:60_000] = math.nan
    values[12_345] = 100.0
    x, y = thinned(steps, values)
    assert len(x) == len(y) <= 4 * COLUMNS
    assert (x[1:] >= x[:-1]).all()
    assert np.nanmax(y) == 100.0
    assert np.nanmin(y) == np.nanmin(values)
    assert (x[0], x[-1], y[0], y[-1]) == (steps[0], steps[-1], values[0], values[-1])
    assert np.isnan(y).mean() == pytest.approx(0.2, abs=0.01)
    width = (steps[-1] - steps[0]) / COLUMNS
    for column in np.random.default_rng(seed + 2).integers(0, COLUMNS, 50):
        low = steps[0] + column * width
        inside, shown = ((each >= low + 1e-6) & (each <= low + width - 1e-6) for each in (steps, x))
        if np.isfinite(values[inside]).any() and shown.any():
            assert np.nanmax(y[shown]) >= np.nanmax(values[inside]) - 1e-12
            assert np.nanmin(y[shown]) <= np.nanmin(values[inside]) + 1e-12
    few = thinned(steps[: 4 * COLUMNS], values[: 4 * COLUMNS])
    assert few[0] is not x
    assert len(few[0]) == 4 * COLUMNS


def test_a_long_run_is_drawn_from_few_points() -> None:
    curves = curves_of(30_000)
    (axes,) = curves.plot().axes
    (lines,) = axes.collections
    assert [len(path) for path in lines.get_segments()] == [pytest.approx(4 * COLUMNS, rel=0.01)] * 2
