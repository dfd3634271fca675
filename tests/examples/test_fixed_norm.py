"""examples/fixed_norm.py: its quick check holds, an interrupted comparison goes on, and rates never see test data."""

import importlib
import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.progress import Progress

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("fixed_norm")


def test_the_quick_check_holds(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Fixed norms cap the network; learned norms, and a head off the sphere, do not. It raises where that fails."""
    threads = torch.get_num_threads()
    example.main(["--quick"])
    printed = capsys.readouterr().out
    assert "end below a third of the loss" in printed
    assert all(name in printed for name in example.OPTIMIZERS)
    assert torch.get_num_threads() == threads


def test_the_quick_check_can_fail(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would if "learned" fixed the norm."""
    train = example.train
    names = {example.LEARNED: example.FIXED}

    def fixed(task: object, name: str, *arguments: object, **options: object) -> object:
        return replace(train(task, names.get(name, name), *arguments, **options), optimizer=name)

    monkeypatch.setattr(example, "train", fixed)
    with pytest.raises(SystemExit, match="learned is no better than a fixed norm"):
        example.quick()


def test_an_interrupted_comparison_goes_on(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that the CSV has are not trained again, and those that it lacks come out as they would have."""
    tasks = importlib.import_module("norm_tasks")
    monkeypatch.setitem(example.TASKS, "mlp", tasks.Digits("toy", epochs=1))
    monkeypatch.setattr(example, "LARGEST", -2)
    monkeypatch.setattr(example, "SMALLEST", -3)
    monkeypatch.setattr(tasks.Digits, "powers", ((-2,), (-3,)))
    path = tmp_path / "folder" / "rows.csv"
    command = ["--only", "mlp", "--seeds", "2", "--out", str(path)]
    example.main(command)
    whole = example.Table(path).rows
    assert {row.optimizer for row in whole} == set(example.OPTIMIZERS)
    assert {(row.lr, row.seed) for row in whole} == {(-2, 0), (-2, 1), (-3, 0), (-3, 1)}
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:5]), encoding="utf-8")
    kept, trained = example.Table(path).rows, []
    train = example.train
    monkeypatch.setattr(example, "train", lambda *arguments: trained.append(arguments) or train(*arguments))
    example.main(command)
    again = example.Table(path).rows
    assert len(trained) == len(again) - len(kept) == len(whole) - 4
    assert [replace(row, date="") for row in again] == [replace(row, date="") for row in whole]
    assert "toy" in capsys.readouterr().out


def test_the_rate_is_chosen_on_validation_data(example: ModuleType) -> None:
    """By its metric, then its loss; a diverged training is never the best."""

    def row(lr: int, validation: float, loss: float, test: float = 0.0) -> object:
        return example.Row("toy", "fixed", lr, -4, 0, 10, validation, loss, test, 0.0, 0.0, "1 1")

    assert example.best_power([row(-2, 0.9, 1.0, test=0.1), row(-3, 0.8, 0.1, test=0.9)]) == -2
    assert example.best_power([row(-2, 0.9, 1.0), row(-3, 0.9, 0.5)]) == -3
    assert example.best_power([row(-2, 0.95, math.nan), row(-3, 0.5, 2.0)]) == -3


def test_parts_of_the_data_share_nothing(example: ModuleType, seed: int) -> None:
    tasks = importlib.import_module("norm_tasks")
    images, _ = tasks.digits()
    parts = tasks.Digits("toy").parts(seed)
    assert [len(labels) for _, labels in parts.values()] == [1097, 300, 400]
    together = torch.cat([part for part, _ in parts.values()])
    # As rows in a sorted order: each of the digits once.
    assert sorted(together.tolist()) == sorted(images.tolist())


def test_what_stands_off_the_sphere(example: ModuleType, seed: int) -> None:
    """The head alone in the networks on digits; in language models the embeddings, too."""
    for name in ("mlp", "gpt32"):
        task = example.TASKS[name]
        model = task.model(seed)
        heads = {id(param) for param in task.head(model)}
        optimizer = example.make_optimizer(example.HEAD_OFF, task, model, 0.1, 0.01)
        turning, others = optimizer.param_groups
        assert heads <= {id(param) for param in others["params"]}
        assert {param.dim() for param in turning["params"]} == {2}
        assert len(heads) == (1 if name == "mlp" else 3)
        everything = example.make_optimizer(example.FIXED, task, model, 0.1, 0.01).param_groups[0]["params"]
        assert len(everything) == len(turning["params"]) + len(heads)


def test_norms_that_follow_the_base_step(example: ModuleType, seed: int) -> None:
    """What the docs warn of is what is run: Adam's first step is the sign of the gradient, but for eps."""
    task = example.TASKS["mlp"]
    model = task.model(seed)
    optimizer = example.make_optimizer(example.FROM_STEP, task, model, 0.01, 0.01)
    task.loss(model, seed, 0).backward()
    weights = [param for param in model.parameters() if param.dim() == 2]
    before = [param.detach().clone() for param in weights]
    optimizer.step()
    for param, old in zip(weights, before, strict=True):
        step = param.grad / (param.grad.abs() + 1e-8)
        cosine = (old.flatten() @ step.flatten() / (old.norm() * step.norm())).item()
        assert (param.norm() / old.norm()).item() == pytest.approx(math.exp(-9 * 0.01 * cosine), rel=1e-5)
        assert optimizer.state[param]["radius"].item() == pytest.approx(param.norm().item(), rel=1e-5)


@pytest.mark.parametrize("page", ["learned_radius.md", "learning_rate.md", "fixed_norms.md"])
def test_the_tables_of_the_docs_are_those_of_the_csv(
    example: ModuleType, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of a table that starts with an optimizer is one that the program prints from the CSV, as it stands."""

    def train(*arguments: object) -> None:
        raise LookupError

    monkeypatch.setattr(example, "train", train)
    table, lines = example.Table(example.RESULTS), set()
    for task, seeds in itertools.product(example.TASKS.values(), (range(3), range(1))):
        try:
            rates = example.Contest(table, seeds, Progress(disable=True)).run(task)
        except LookupError:
            continue
        lines |= {tuple(cells) for cells in example.outcome(table, task, rates, seeds)}
        lines |= {tuple(cells) for cells in example.by_rate(table, task, rates, seeds)[1]}
    text = (EXAMPLES.parent / "docs" / page).read_text(encoding="utf-8")
    names = (*example.OPTIMIZERS, example.FROM_STEP)
    rows = (tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.splitlines() if line[:2] == "| ")
    told = {cells for cells in rows if cells[0] in names}
    assert told
    assert told <= lines


def test_a_task_that_cannot_run_says_what_it_needs(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example.TASKS["gpt2"], "needs", "no_such_package")
    with pytest.raises(SystemExit):
        example.main(["--only", "gpt2,x"])
    assert "choose from mlp, batchnorm" in (printed := capsys.readouterr().err)
    assert "gpt2 needs no_such_package" in printed
