"""What is made of measurements: rows in files, tables, pictures, and the one definition of a ratio."""

import dataclasses
import math
from pathlib import Path

import matplotlib.image
import pytest

from bench import goals, plot, ratios, scaling, table
from bench.measure import measure
from bench.providers import yardstick
from bench.rows import quartiles, read, write
from bench.runner import COPY, Contestant, Model
from bench.shapes import MODELS

from .support import CPU, TINY, eager, named, tiny_rows


def check_picture(path: Path) -> None:
    pixels = matplotlib.image.imread(path).reshape(-1, 4)
    assert 0.5 < float((pixels == 1).all(1).mean()) < 0.99, "a figure is mostly paper, but not only"


def test_plot_and_table_of_a_file(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    write(path, [*tiny_rows("momentum", "ResNet-50"), *tiny_rows("momentum", "2000 x 10k")])
    plot.main([str(path)])
    check_picture(tmp_path / "rows.png")
    plot.main([str(path), "--out", str(tmp_path / "rows.svg")])
    drawn = (tmp_path / "rows.svg").read_text()
    for each in eager("momentum"):
        assert (each.name in drawn) == (not each.skipped)
    capsys.readouterr()
    table.main([str(path)])
    printed = capsys.readouterr().out
    assert "| | ResNet-50 | 2000 x 10k |" in printed
    for row in read(path):
        assert row.provider in printed
        assert row.skipped in printed


def test_the_table_has_the_copy_of_the_whole_model(seed: int) -> None:
    """It is timed on a part where a model is large."""
    copied = next(row for row in tiny_rows("momentum", "GPT-2 small") if row.provider == COPY)
    assert copied.median_ms is not None
    assert copied.ratio_median is not None
    part = dataclasses.replace(copied, parameters=3 * copied.parameters)
    median, ratio = (float(each.strip("()")) for each in table.cell(part).split())
    assert median == pytest.approx(3 * copied.median_ms, rel=0.01)
    assert ratio == pytest.approx(3 * copied.ratio_median, rel=0.01, abs=0.01)


def test_plot_refuses_a_file_without_such_rows(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    write(path, tiny_rows("sgd"))
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(path), "--base", "adam"])
    assert "no row of base 'adam'" in capsys.readouterr().err
    path.write_text(path.read_text().replace("median_ms", "median_s"))
    with pytest.raises(ValueError, match="median_s"):
        read(path)


@pytest.mark.exhaustive
def test_scaling_sweeps_are_measured_and_drawn(seed: int, tmp_path: Path) -> None:
    out, figure = tmp_path / "scaling.csv", tmp_path / "scaling.png"
    entrants = {each.name for each in scaling.entrants(CPU)}
    scaling.main(["--rounds", "2", "--largest", "100000", "--most", "10", "--out", str(out), "--figure", str(figure)])
    check_picture(figure)
    rows = read(out)
    assert {row.parameters for row in rows if row.model == scaling.BY_WEIGHTS} == {10**4, 10**5}
    assert {row.tensors for row in rows if row.model == scaling.BY_TENSORS} == {1, 10}
    assert {row.provider for row in rows} == entrants | {COPY}
    scaling.main(["--from", str(out), "--figure", str(figure)])


def test_sweeps_hold_fixed_what_they_say() -> None:
    for power, shapes in enumerate(scaling.by_weights(10**9), start=4):
        assert (len(shapes), sum(map(math.prod, shapes))) == (16, 10**power)
    for power, shapes in enumerate(scaling.by_tensors(10**5)):
        assert (len(shapes), sum(map(math.prod, shapes))) == (10**power, 10**7)


def test_ratios_writes_its_rows(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "ResNet-50", lambda: TINY)
    monkeypatch.setattr("bench.measure.providers", lambda base, device: eager(base))
    out = tmp_path / "out.csv"
    ratios.main(["--base", "sgd", "--model", "ResNet-50", "--rounds", "2", "--dtype", "float64", "--out", str(out)])
    rows = read(out)
    assert [row.provider for row in rows] == [COPY, *(each.name for each in eager("sgd"))]
    assert {row.dtype for row in rows} == {"float64"}
    assert next(row for row in rows if row.provider == COPY).bytes_per_parameter == 16
    assert "SGD fused" in capsys.readouterr().out


def test_a_ratio_is_the_median_of_the_rounds_own(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine slows down for a while, a quotient of medians would come from different rounds."""
    unit, ours = yardstick("sgd"), "FusedLayca torch"
    seconds = {COPY: [1.0] * 5, unit: [1.0, 1.0, 10.0, 10.0, 10.0], ours: [2.0, 2.0, 1.0, 15.0, 30.0]}
    monkeypatch.setattr("bench.measure.interleave", lambda *_: seconds)
    only = [named("sgd", unit), named("sgd", ours)]
    row = measure("sgd", "tiny", TINY, 5, CPU, only=only, tell=lambda _: None)[-1]
    assert row.median_ms == 2000
    assert (row.ratio_q1, row.ratio_median, row.ratio_q3) == (1.5, 2.0, 2.0)
    entries = {name: Contestant(named("sgd", unit), Model(TINY, CPU)) for name in seconds}
    found = goals.Run("sgd", "tiny", entries, seconds).ratio("ours", "", ours, unit)
    assert (found.q1, found.value, found.q3, found.rounds) == (1.5, 2.0, 2.0, 5)


def test_a_file_of_quotients_of_medians_is_refused(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    write(path, tiny_rows("sgd"))
    path.write_text(path.read_text().replace("ratio_median", "ratio"))
    with pytest.raises(ValueError, match=r"old\.csv is of a time when .* measure again"):
        read(path)


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("model", "tensors", "weights"),
    [
        # Counted from the published models: torchvision's two, and the configurations of GPT-2 and Llama 3.2 1B.
        ("ResNet-50", 161, 25_557_032),
        ("ViT-B/16", 152, 86_567_656),
        ("GPT-2 small", 148, 124_439_808),
        ("Llama 1B", 146, 1_235_814_400),
        ("1B in 4096 x 4096", 60, 1_006_632_960),
        ("2000 x 10k", 2000, 20_000_000),
        ("10000 x 100", 10_000, 1_000_000),
    ],
)
def test_shapes_are_those_of_the_models(model: str, tensors: int, weights: int) -> None:
    shapes = MODELS[model]()
    assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, weights)
