"""docs/trainers.md: its code runs as it stands there, and trains with FusedLayca."""

from pathlib import Path
from typing import Any

import pytest

from layca_fast import FusedLayca

from .recipes import PAGE, recipes


def optimizer_of(names: dict[str, Any]) -> FusedLayca:
    """The one that was trained with; Lightning makes it by itself, accelerate wraps it, torchtitan keeps several."""
    found = names.get("optimizer") or (names.get("trainer") or names["optimizers"]).optimizers[0]
    found = getattr(found, "optimizer", found)
    assert isinstance(found, FusedLayca)
    return found


def test_every_block_is_found() -> None:
    assert PAGE.read_text(encoding="utf-8").count("```python") == len(recipes()) == 8


@pytest.mark.parametrize("name", recipes())
def test_the_recipe_turns_the_layers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, seed: int
) -> None:
    if name.startswith("timm"):
        request.getfixturevalue("torchvision")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(recipes()[name], f"docs/trainers.md, {name}", "exec"), names)
    optimizer = optimizer_of(names)
    turned = [each for param, each in optimizer.rotation_stats().items() if "radius" in optimizer.state[param]]
    assert len(turned) >= 2
    for stats in turned:
        assert float(stats.angle) > 0
        assert float(stats.norm) == pytest.approx(float(stats.radius))
