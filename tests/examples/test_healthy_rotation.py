"""examples/healthy_rotation.py at toy size: the trainings differ as their titles say, and the figure is drawn."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from layca_fast.commands.demo.training import Digits

EXAMPLE = Path(__file__).parents[2] / "examples" / "healthy_rotation.py"

SIZE, STEPS = 150, 3


@pytest.fixture
def example(seed: int, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """On noise: what is tested is how far layers turn."""
    spec = importlib.util.spec_from_file_location("healthy_rotation", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look for their module.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    images, labels = torch.randn(SIZE, 1, 14, 14), torch.arange(SIZE) % 10
    monkeypatch.setattr(module, "load_digits", lambda: Digits(images, labels, images, labels))
    return module


def furthest(rate: float) -> float:
    """1 - cos after all steps, had they the same direction."""
    return (1 - math.cos(STEPS * math.atan(rate))) * (1 + 1e-5) + 1e-7


def test_the_trainings_turn_as_their_titles_say(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    draw = example.draw
    monkeypatch.setattr(example, "draw", lambda path, results: (drawn.extend(results), draw(path, results)))
    monkeypatch.setenv("COLUMNS", "120")
    example.main(["--epochs", "1", "--out", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for case, run in drawn:
        assert case.title in printed
        assert f"{run.accuracy[-1]:.3f}" in printed
    small, healthy, large, first, last, _ = [run.rotation[-1] for _, run in drawn]
    assert max(small) <= furthest(3**-7) < max(healthy) / 10
    assert max(healthy) <= furthest(example.RATE) < max(large)
    # (1 - 0.6)^5 is the factor of the layer at the other end.
    assert first[-1] <= furthest(example.RATE * 0.4**5) < first[0] / 10
    assert last[0] <= furthest(example.RATE * 0.4**5) < last[-1] / 10
