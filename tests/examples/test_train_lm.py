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
    """Three optimizers; what follows the interruption steps inside backward, which must not make a difference.

    On one process the sums have another order, in bfloat16.
    """
    names = ",".join(OPTIMIZERS)
    whole, cut, alone = tmp_path / "whole", tmp_path / "cut", tmp_path / "alone"
    printed = train_on_two_processes("--optimizer", names, "--seed", str(seed), "--checkpoint", str(whole))
    for name in OPTIMIZERS:
        for folder in (cut, alone):
            shutil.copytree(whole / name / "step-2", folder / name / "step-2")
    again = train_on_two_processes("--optimizer", names, "--seed", str(seed), "--checkpoint", str(cut), "--in-backward")
    assert table(again) == table(printed)
    assert set(table(printed)) == {"2", "4", "held-out"}
    assert all(len(losses) == len(OPTIMIZERS) for losses in table(printed).values())
    for name in OPTIMIZERS:
        first, one, other = (contents_of(path / name / f"step-{n}") for path, n in ((whole, 2), (whole, 4), (cut, 4)))
        assert same_bits(one, other)
        assert not same_bits(first["model"], one["model"])
    monkeypatch.delenv("RANK", raising=False)
    example.main([*TOY, "--optimizer", names, "--seed", str(seed), "--checkpoint", str(alone)])
    for row, losses in table(capsys.readouterr().out).items():
        assert losses == pytest.approx(table(printed)[row], abs=5e-3)


def test_one_process_needs_no_torchrun(
    example: ModuleType, seed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    example.main([*TOY, "--optimizer", "hyperball", "--rotate-head", "--rotate-embeddings", "--seed", str(seed)])
    losses = table(capsys.readouterr().out)
    assert all(0 < loss < 8 for (loss,) in losses.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "layca,sgd"], "--optimizer sgd: choose from layca, hyperball, adamw, muon, muon-layca, "),
        (["--search", "--lr", "0.1"], "--lr 0.1: a search tries rates of its own; leave it out"),
        (["--search", "--checkpoint", "runs"], "--checkpoint runs: is for one width"),
        (["--width", "16,32", "--checkpoint", "runs"], "--checkpoint runs: is for one width"),
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together(
    example: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("in_backward", [False, True], ids=["ordinary", "in backward"])
def test_muon_plain_and_turned(
    example: ModuleType,
    in_backward: bool,
    seed: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On one process, at two widths: what is hidden turns, or decays, and all the rest is Adam's."""
    monkeypatch.delenv("RANK", raising=False)
    trained = []
    held_out = example.Training.held_out_loss
    monkeypatch.setattr(example.Training, "held_out_loss", lambda self: trained.append(self) or held_out(self))
    names = ["muon", "muon-layca", "muon-hyperball"]
    more = ["--in-backward"] if in_backward else []
    example.main([*TOY, "--optimizer", ",".join(names), "--width", "16,24", "--seed", str(seed), *more])
    printed = capsys.readouterr().out
    assert "width 16" in printed
    assert "width 24" in printed
    assert all(0 < loss < 8 for losses in table(printed).values() for loss in losses)
    assert [(each.options.width, each.model.blocks[0].expand.weight.shape[1]) for each in trained] == [
        *[(16, 16)] * 3,
        *[(24, 24)] * 3,
    ]
    for training, name in zip(trained, names * 2, strict=True):
        groups = training.optimizer.param_groups
        of = {
            key: (group, param)
            for group in groups
            for key, param in zip(group["param_names"], group["params"], strict=True)
        }
        assert set(of) == {key for key, _ in training.model.named_parameters()}
        for key, (group, param) in of.items():
            hidden = "blocks" in key and "norm" not in key
            assert group["base"] == ("muon" if hidden else "adam"), key
            assert ("radius" in training.optimizer.state[param]) == (hidden and name != "muon"), key
            assert group["weight_decay"] == (example.WEIGHT_DECAY if hidden and name == "muon" else 0), key


def test_a_search_goes_on_where_it_was_interrupted(
    example: ModuleType,
    tmp_path: Path,
    seed: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And ends where the best rate has worse ones on both sides, or no more on one; what has diverged is the worst."""
    monkeypatch.delenv("RANK", raising=False)
    search, results = importlib.import_module("lm_search"), importlib.import_module("result_rows")
    monkeypatch.setattr(search, "LARGEST", -2)
    asked: list[tuple[str, int, float, int]] = []

    class Pretended:
        """Best at 2^-7 for AdamW, at the largest rate for the others; infinite beyond 2^-5 for AdamW."""

        def __init__(self, name: str, options: Any, *_: object) -> None:
            self.asked = (name, options.width, options.lr, options.seed)

        def run(self) -> None:
            asked.append(self.asked)

        def held_out_loss(self) -> float:
            name, width, lr, number = self.asked
            if name == "adamw":
                return abs(lr - 2**-7) + number / width if lr < 2**-5 else float("nan")
            return 1 / lr + number

    monkeypatch.setattr(example, "Training", Pretended)
    path = tmp_path / "folder" / "rows.csv"
    command = ["--optimizer", "adamw,muon-layca", "--width", "16,24", "--search", "--seeds", "2", "--out", str(path)]
    example.main(command)
    first = capsys.readouterr().out
    rates = {name: sorted({lr for who, _, lr, _ in asked if who == name}) for name in ("adamw", "muon-layca")}
    assert rates == {"adamw": [2**-8, 2**-7, 2**-6, 2**-5], "muon-layca": [2**-5, 2**-4, 2**-3, 2**-2]}
    assert len(asked) == len(set(asked)) == 2 * 2 * 8
    whole = results.read(path, search.Row)
    assert [(row.optimizer, row.width, 2.0**row.lr, row.seed) for row in whole] == asked
    assert "2^-7" in first
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:6]), encoding="utf-8")
    asked.clear()
    example.main(command)
    assert len(asked) == len(whole) - 5
    assert [row.key() for row in results.read(path, search.Row)] == [row.key() for row in whole]
    assert capsys.readouterr().out.splitlines()[-6:] == first.splitlines()[-6:]


def test_a_search_trains(
    example: ModuleType, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    search, results = importlib.import_module("lm_search"), importlib.import_module("result_rows")
    monkeypatch.setattr(search, "LARGEST", -4)
    monkeypatch.setattr(search, "SMALLEST", -5)
    path = tmp_path / "rows.csv"
    example.main([*TOY, "--optimizer", "muon-layca", "--search", "--seed", str(seed), "--out", str(path)])
    rows = results.read(path, search.Row)
    assert sorted(row.lr for row in rows) == [-5, -4]
    assert all(0 < row.held_out < 8 and (row.steps, row.seed) == (4, seed) for row in rows)
    assert "width 16" in capsys.readouterr().out


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
