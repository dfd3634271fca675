"""examples/demo_rates.py: the demo has the rates that the CSV chooses, each inside of those tried; so has its page."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from layca_fast.commands.demo.bases import PAPER_BASES
from layca_fast.commands.demo.training import Digits

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in (EXAMPLES, EXAMPLES / "papers"):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("demo_rates")


def test_the_demo_has_the_rates_that_validation_chooses(example: ModuleType) -> None:
    """Each beside worse ones on both sides, over the same seeds: nothing is missing from the CSV."""
    found = example.STUDY.read()
    assert example.STUDY._missing(found, sorted(found.frame["seed"].unique())) == []
    for base, row in PAPER_BASES.items():
        for side, rate in zip(example.SIDES, (row.plain_rate, row.layca_rate), strict=True):
            lr, _ = example.chosen(found, base, side)
            assert rate == pytest.approx(3.0**lr), f"{base}, {side}: validation chooses 3^{lr}"
            assert {lr - 1, lr + 1} <= set(found.of(base=base, optimizer=side).frame["lr"])


def test_the_table_of_the_page_is_that_of_the_csv(example: ModuleType) -> None:
    """`python examples/papers/write_page.py --page docs/demo.md` changes nothing."""
    text = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    assert "<!-- table of demo_rates -->" in text
    assert importlib.import_module("write_page").render(text) == text


def test_a_training_is_judged_by_the_digits_of_the_validation(
    example: ModuleType, few_digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for those, and what it notes is the demo's accuracy there."""
    asked: list[bool] = []
    monkeypatch.setattr(example, "load_digits", lambda validation=False: asked.append(validation) or few_digits)
    monkeypatch.setattr(example, "EPOCHS", 1)
    example.digits.cache_clear()
    ((quantity, _, accuracy),) = example.measure({"base": "sgd", "optimizer": "FusedLayca", "lr": -3}, 0, False)
    example.digits.cache_clear()
    racer = example.contestants("sgd", "auto", torch.device("cpu"), layca_rate=3.0**-3)[1]
    run = example.train(racer.optimizer, few_digits, epochs=1, seed=0, on_epoch=lambda _: None)
    assert asked == [True]
    assert (quantity, accuracy) == ("validation accuracy", run.accuracy[-1])
