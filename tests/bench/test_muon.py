"""``python -m bench.muon`` on tiny models, and that no base is measured on tensors that it cannot take."""

import csv
import re
from pathlib import Path

import pytest
import torch

from bench import bases, muon
from bench.muon_steps import BY_HAND, OURS, OneProduct, Watched, by_hand, float32, orthogonalized
from bench.runner import Model
from layca_fast.commands.cases import describe_base
from layca_fast.formulas import products
from layca_fast.formulas.bases import BASES
from layca_fast.reference import newton_schulz

from ..support import relative_distance

CPU = torch.device("cpu")


def test_every_goal_is_measured_and_written(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in muon.MODELS:
        monkeypatch.setitem(muon.MODELS, model, lambda: [(30, 40), (7, 9), (40, 30), (330, 330)])
    path = tmp_path / "muon.csv"
    muon.main(["--rounds", "3", "--quick", "--out", str(path)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    goals = {(row["model"], row["what"]) for row in rows if row["goal"]}
    assert {(model, f"over {name}") for model, name in muon.GOALS} <= goals
    assert len(goals) == len(muon.GOALS) + 3 * len(muon.PARTS)
    for row in rows:
        assert 0 < float(row["q1"]) <= float(row["value"]) <= float(row["q3"])
        assert row["what"] != "part of the step that is no product" or float(row["value"]) < 1
    printed = capsys.readouterr().out
    # In the quick run heavyball, which compiles for a minute, is told to be left out.
    assert all(word in printed for word in ("heavyball Muon", "not run", "pytorch_optimizer Muon", "torch Muon"))
    # Which of them hangs on the machine.
    assert re.search("met|MISSED", printed)


def test_the_step_by_hand_is_muons(seed: int) -> None:
    for shape in ((6, 9), (9, 6)):
        matrix = torch.randn(shape, dtype=torch.float64)
        exact = newton_schulz(matrix, 5, (3.4445, -4.775, 2.0315), 1e-7)
        assert relative_distance(orthogonalized(matrix), exact) < 1e-9
        ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        ours.grad, theirs.grad = matrix.float(), matrix.float()
        by_hand([ours])()
        torch.optim.Muon([theirs], lr=1e-3, weight_decay=0.0).step()
        assert relative_distance(ours.detach() - 1, theirs.detach() - 1) < 0.05


def test_the_work_of_a_step_is_counted(seed: int) -> None:
    """Of one square matrix in strips, five times: two symmetric products, and a whole one."""
    provider = next(each for each in float32() if each.name == OURS)
    watched = Watched(provider, Model([(512, 512)], CPU))
    before = products.multiply
    watched.step()
    assert products.multiply is before
    assert watched.work == 5 * 2 * 512**3 * (2 * 0.625 + 1)
    assert len(watched.seconds) == 1
    assert OneProduct(watched.work, CPU).work == pytest.approx(watched.work, rel=1e-2)
    assert {each.name for each in float32()} >= {OURS, BY_HAND}


def test_other_bases_have_their_own_command() -> None:
    assert BASES["muon"].formula(BASES["muon"].options).direct is not None
    names = [each.name for each in bases.contestants(CPU)]
    assert len(names) > 10
    assert not any("muon" in name for name in names)
    assert "muon" in describe_base({"base": "muon"})[0]
