"""examples/train_lm.py at toy size: what it prints, and a run on two processes that was interrupted."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ..support import HANGS, same_bits

ROOT = Path(__file__).parents[2]
OPTIMIZERS = ("layca", "hyperball", "adamw")
TOY = ["--layers=1", "--width=16", "--heads=2", "--context=16", "--batch=4"]
TOY += ["--steps=4", "--log-every=2", "--save-every=2"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("train_lm")


def train_on_two_processes(*arguments: str) -> str:
    """What the run printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    finished = subprocess.run(
        [*command, str(ROOT / "examples" / "train_lm.py"), *TOY, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=HANGS,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def table(printed: str) -> dict[str, list[float]]:
    """The rows with a number in every column."""
    rows = (line.split() for line in printed.replace("held out", "held-out").replace(",", "").splitlines())
    return {row[0]: [float(cell) for cell in row[1:]] for row in rows if row and row[0] in ("2", "4", "held-out")}


def contents_of(folder: Path) -> dict[str, Any]:
    """A distributed checkpoint, put together in one process."""
    dcp_to_torch_save(folder, folder / "all.pt")
    loaded: dict[str, Any] = torch.load(folder / "all.pt", weights_only=False)
    return loaded


@pytest.mark.exhaustive
def test_an_interrupted_run_ends_in_the_bits_of_one_that_was_not(
    example: ModuleType,
    seed: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All three optimizers; what follows the interruption steps inside backward, which must not make a difference.

    On one process the sums have another order, in bfloat16.
    """
    whole, cut, alone = tmp_path / "whole", tmp_path / "cut", tmp_path / "alone"
    printed = train_on_two_processes("--optimizer", "all", "--seed", str(seed), "--checkpoint", str(whole))
    for name in OPTIMIZERS:
        for folder in (cut, alone):
            shutil.copytree(whole / name / "step-2", folder / name / "step-2")
    again = train_on_two_processes("--optimizer", "all", "--seed", str(seed), "--checkpoint", str(cut), "--in-backward")
    assert table(again) == table(printed)
    assert set(table(printed)) == {"2", "4", "held-out"}
    assert all(len(losses) == len(OPTIMIZERS) for losses in table(printed).values())
    for name in OPTIMIZERS:
        first, one, other = (contents_of(path / name / f"step-{n}") for path, n in ((whole, 2), (whole, 4), (cut, 4)))
        assert same_bits(one, other)
        assert not same_bits(first["model"], one["model"])
    monkeypatch.delenv("RANK", raising=False)
    example.main([*TOY, "--optimizer", "all", "--seed", str(seed), "--checkpoint", str(alone)])
    for row, losses in table(capsys.readouterr().out).items():
        assert losses == pytest.approx(table(printed)[row], abs=5e-3)


def test_one_process_needs_no_torchrun(
    example: ModuleType, seed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    example.main([*TOY, "--optimizer", "hyperball", "--rotate-head", "--rotate-embeddings", "--seed", str(seed)])
    losses = table(capsys.readouterr().out)
    assert all(0 < loss < 8 for (loss,) in losses.values())
    with pytest.raises(SystemExit):
        example.main(["--optimizer", "layca,sgd"])
    assert "--optimizer sgd: choose from layca, hyperball, adamw, or all" in capsys.readouterr().err


def test_the_data_is_the_same_on_any_number_of_processes(example: ModuleType, seed: int) -> None:
    data = importlib.import_module("lm_data")
    text = data.python_reference()
    whole = data.batch(text.train, 6, 10, seed)
    parts = [data.batch(text.train, 6, 10, seed, rank, 3) for rank in range(3)]
    assert same_bits(whole, tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True)))
    inputs, targets = whole
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    with pytest.raises(ValueError, match="6 rows cannot be divided among 4"):
        data.batch(text.train, 6, 10, seed, 0, 4)
