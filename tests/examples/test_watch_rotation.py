"""The scripts in examples/ run as they stand."""

import re
import runpy
from pathlib import Path

import pytest

from layca_fast.monitor.reading import read_curves

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_watch_rotation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints, draws and logs the same nine layers."""
    main = runpy.run_path(str(EXAMPLES / "watch_rotation.py"))["main"]
    figure, log = tmp_path / "rotation.png", tmp_path / "run.jsonl"
    main(["--epochs", "1", "--out", str(figure), "--log", str(log)])
    curves = read_curves(log)
    assert curves.steps == list(range(0, 21, 4))
    assert (curves.rotation[1:] > 0).all()
    printed = dict(re.findall(r"(\S+) +1 - cos = (\S+)", capsys.readouterr().out))
    assert printed == {name: f"{curves.of(name)[-1]:.3f}" for name in curves.names}
    assert len(printed) == 9
    assert figure.stat().st_size > 20_000
