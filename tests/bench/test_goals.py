"""``python -m bench.goals`` on tiny models."""

import csv
from pathlib import Path

import pytest
import torch

from bench import goals, ratios
from bench.goals import FUSED_GOALS, Result, is_met
from bench.rows import read
from bench.runner import COPY
from bench.shapes import MODELS


def test_every_goal_is_measured_and_written(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in MODELS:
        monkeypatch.setitem(MODELS, model, lambda: [(30, 40), (40,), (7, 9)])
    before, path = torch.get_num_threads(), tmp_path / "goals.csv"
    goals.main(["--rounds", "3", "--out", str(path)])
    assert torch.get_num_threads() == before
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["base"], row["model"]) for row in rows if row["what"] == "over the bare loop"} == set(FUSED_GOALS)
    # Kernels of three models and the whole step of one, rotating and not, and its host part: under both bases.
    assert sum(row["goal"] != "" for row in rows) == len(FUSED_GOALS) + 2 * (2 * 3 + 2 + 1) + 5
    for row in rows:
        # A difference of two times may be anything.
        assert float(row["value"]) > 0 or row["what"].endswith("us")
        assert float(row["q1"]) <= float(row["value"]) <= float(row["q3"])
        assert float(row["ms"]) > 0
        assert int(row["rounds"]) == 3
        assert float(row["gb_per_s"]) > 0
        assert float(row["copy_gb_per_s"]) > 0
    assert "denormal over normal" in capsys.readouterr().out


def test_denormal_momentum_is_what_is_measured(seed: int) -> None:
    stage = goals.Model([(30, 40), (7, 9)], goals.CPU)
    entry = goals.Decayed(goals.named("momentum")[goals.OURS], stage, 1e-39)
    entry.check()
    entry.prepare()
    assert entry._buffers
    assert all((buffer == 1e-39).all() and (buffer != 0).all() for buffer in entry._buffers)
    entry.step()
    assert all((buffer == 0).all() for buffer in entry._buffers)


@pytest.mark.parametrize(
    ("goal", "value", "met"), [("<= 1.1", 1.1, "yes"), ("<= 1.1", 1.11, "no"), (">= 1.6", 1.5, "no")]
)
def test_a_goal_has_a_side(goal: str, value: float, met: str) -> None:
    numbers = {"value": value, "q1": value, "q3": value, "ms": 1.0, "gb_per_s": 1.0, "copy_gb_per_s": 1.0}
    words = dict.fromkeys(("what", "base", "model", "date", "cpu", "torch"), "")
    assert is_met(Result(**words, **numbers, goal=goal, rounds=3, threads=2)) == met


def test_ratios_of_single_providers(
    seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(MODELS, "ResNet-50", lambda: [(30, 40), (7, 9)])
    out = tmp_path / "out.csv"
    about = ["--model", "ResNet-50", "--base", "adam", "--rounds", "2", "--out", str(out)]
    ratios.main([*about, "--provider", goals.OURS])
    assert [row.provider for row in read(out)] == [COPY, "Adam fused", goals.OURS]
    with pytest.raises(SystemExit):
        ratios.main([*about, "--provider", "nobody"])
    assert "--provider 'nobody' is unknown: choose one of" in capsys.readouterr().err
