"""examples/papers/transfer.py: its search brackets every best, tables follow from the CSV, the quick check can fail."""

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "papers"))
    return importlib.import_module("transfer")


@pytest.fixture
def training() -> ModuleType:
    return importlib.import_module("transfer_training")


def parabola(training: ModuleType, trained: list[Any]) -> Callable[..., Any]:
    """Instead of a training: the best power is -5 at width 32 and falls as the width grows, but for Layca's."""

    def train(setting: Any, power: float, seed: int) -> Any:
        trained.append((setting, power, seed))
        drift = 0 if setting.optimizer == "layca" else math.log2(setting.width / 32)
        loss = 2 + (power + 5 + drift) ** 2 + 0.01 * seed
        # So far up, trainings diverge.
        held_out = math.inf if power > -3 else loss
        return replace(training.row_of(setting, power, seed), held_out=held_out, date="today")

    return train


def command(out: Path, *more: str) -> list[str]:
    return ["--only", "width", "--optimizer", "adamw,layca", "--out", str(out), "--figures", str(out.parent), *more]


def test_every_best_lies_inside_its_grid_and_what_the_csv_has_is_not_trained_again(
    example: ModuleType,
    training: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All widths at the same rates, with all seeds; interrupted anywhere, the rest is trained and nothing else."""
    trained: list[Any] = []
    monkeypatch.setattr(example, "train", parabola(training, trained))
    out = tmp_path / "rows.csv"
    with monkeypatch.context() as context:
        context.setattr(example, "report", lambda *_: None)
        example.main(command(out, "--seeds", "2"))
    assert len(set(trained)) == len(trained)
    whole = set(trained)
    for name, best in {"adamw": {32: -5, 64: -6, 128: -7}, "layca": {32: -5, 64: -5, 128: -5}}.items():
        powers = {
            each.width: {power for setting, power, _ in whole if setting == each}
            for each in {setting for setting, _, _ in whole if setting.optimizer == name}
        }
        assert set(powers) == set(best)
        lowest, highest = min(best.values()) - 1, max(best.values()) + 1
        assert all(set(range(lowest, highest + 1)) <= each for each in powers.values())
    text = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(text[:8]), encoding="utf-8")
    trained.clear()
    example.main(command(out, "--seeds", "2"))
    assert len(trained) == len(whole) - 7
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
    assert (tmp_path / "transfer_regret.png").stat().st_size > 10_000
    assert "2^-7: 2.005" in " ".join(capsys.readouterr().out.split())


def test_the_regret_is_what_the_smallest_widths_best_rate_costs(
    example: ModuleType, training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = importlib.import_module("transfer_report")
    monkeypatch.setattr(example, "train", parabola(training, []))
    monkeypatch.setattr(example, "report", lambda *_: None)
    out = tmp_path / "rows.csv"
    example.main(command(out, "--seeds", "3"))
    table = example.Table(out)
    found = {name: reports.outcomes(table, reports.STUDIES["width"], name)[-1] for name in ("adamw", "layca")}
    assert found["adamw"].best == -7
    assert found["adamw"].regret == pytest.approx([4, 4, 4])
    assert found["adamw"].losses[-7] == pytest.approx([2, 2.01, 2.02])
    assert found["layca"].regret == pytest.approx([0, 0, 0])
    assert all(each.inside for each in found.values())
    # A seed that only some of the rates have does not count.
    table.add(replace(training.row_of(training.Setting("adamw", 128), -7, 3), held_out=0.0))
    assert reports.outcomes(table, reports.STUDIES["width"], "adamw")[-1] == found["adamw"]


def test_pages_get_their_tables_and_keep_the_rest(example: ModuleType, tmp_path: Path) -> None:
    """Places without a table are filled without touching what stands between them and the next one."""
    reports = importlib.import_module("transfer_report")
    page = tmp_path / "page.md"
    empty, old = (f"<!-- transfer: {name} -->\n{rest}<!-- end -->\n" for name, rest in (("a", ""), ("b", "\nold\n\n")))
    page.write_text(f"before\n\n{empty}\nbetween\n\n{old}\nafter\n", encoding="utf-8")
    reports.fill(page, {"a": "| new |", "b": "| newer |", "c": "| other |"})
    filled = [
        f"<!-- transfer: {name} -->\n\n| {new} |\n\n<!-- end -->\n" for name, new in (("a", "new"), ("b", "newer"))
    ]
    assert page.read_text(encoding="utf-8") == f"before\n\n{filled[0]}\nbetween\n\n{filled[1]}\nafter\n"
    reports.fill(page, {"a": "| new |", "b": "| newer |"})
    assert page.read_text(encoding="utf-8") == f"before\n\n{filled[0]}\nbetween\n\n{filled[1]}\nafter\n"


def test_the_documented_tables_are_those_of_the_csv(example: ModuleType, tmp_path: Path) -> None:
    """python examples/papers/transfer.py --report writes them."""
    reports = importlib.import_module("transfer_report")
    table = example.Table(example.RESULTS)
    for page in example.PAGES:
        copy = tmp_path / page.name
        copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
        assert "<!-- transfer: " in copy.read_text(encoding="utf-8")
        reports.fill(copy, reports.tables(table))
        assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), page.name


def test_a_training_of_each_optimizer_follows_from_its_seed(
    example: ModuleType, training: ModuleType, seed: int
) -> None:
    """Toy size. What is hidden moves with the rate, under AdamW for hidden matrices too, and the others' rate stays."""
    toy = {"width": 8, "depth": 1, "steps": 3, "heads": 2, "context": 16, "batch": 2}
    for name in training.OPTIMIZERS:
        setting = training.Setting(name, **toy)
        first = training.train(setting, -4, seed)
        assert 0 < first.held_out < 10
        assert training.train(setting, -4, seed).held_out == first.held_out
        assert training.train(setting, -2, seed).held_out != first.held_out
    _, optimizer = training.start(training.Setting("adamw-hidden", **toy), 0.5, seed)
    rates = {tuple(param.shape): group["lr"] for group in optimizer.param_groups for param in group["params"]}
    assert rates[(8, 8)] == rates[(32, 8)] == 0.5
    assert rates[(8,)] == training.OTHERS_RATE


def test_scaled_weights_and_warm_up(example: ModuleType, training: ModuleType, seed: int) -> None:
    plain, scaled = (training.start(training.Setting("layca", 8, 1, scale=scale), 0.1, seed)[0] for scale in (1.0, 4.0))
    for name, param in plain.named_parameters():
        factor = 4 if name.startswith("blocks") and param.dim() >= 2 else 1
        assert (scaled.get_parameter(name) == factor * param).all()
    assert training.factor(0, 300, True) == 1 / 15
    assert training.factor(0, 300, False) == 1
    assert training.factor(299, 300, True) == training.factor(299, 300, False) == 0


@pytest.mark.exhaustive
def test_the_quick_check_holds(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """AdamW's best rate of a small model is wrong for a large one, and Layca's along Muon's direction is not."""
    example.main(["--quick"])
    assert "costs AdamW more than twice" in capsys.readouterr().out


def test_the_quick_check_can_fail(example: ModuleType, training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would if the rate of AdamW were as good at both widths."""
    monkeypatch.setattr(
        example,
        "train",
        lambda setting, power, seed: replace(training.row_of(setting, power, seed), held_out=power**2.0),
    )
    with pytest.raises(SystemExit, match="serves AdamW as well"):
        example.quick()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "width,height"], "--only height: choose from width, "),
        (["--optimizer", "sgd"], "--optimizer sgd: choose from adamw, "),
        (["--seeds", "0"], "--seeds 0: give 1 or more"),
    ],
    ids=str,
)
def test_arguments_that_are_wrong(
    example: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())
