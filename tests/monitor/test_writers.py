"""Where curves go: CSV, JSON lines and TensorBoard, and the command that draws a file afterwards."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from layca_fast import Curves, RotationMonitor, __main__
from layca_fast.monitor.curves import QUANTITIES
from layca_fast.monitor.reading import read_curves
from layca_fast.monitor.writers import CsvWriter, JsonLinesWriter, TensorBoardWriter

from ..support import same_bits

FILES = {"run.csv": CsvWriter, "run.jsonl": JsonLinesWriter}
every_file = pytest.mark.parametrize(("name", "writer"), FILES.items(), ids=FILES.keys())


def monitored(per_step: bool = True) -> tuple[RotationMonitor, list[nn.Parameter]]:
    """Layers with names that files must quote, one of them without an angle."""
    params = [(name, nn.Parameter(torch.randn(3, 4))) for name in ('a,"b".weight', "ü.weight", "zero")]
    params[2][1].data.zero_()
    return RotationMonitor(torch.optim.SGD(params, 0.1), per_step=per_step, every=3), [param for _, param in params]


def go_on(monitor: RotationMonitor, params: list[nn.Parameter], steps: int) -> None:
    for _ in range(steps):
        for param in params[:2]:
            param.data += 0.1 * torch.randn_like(param)
        monitor.record()


def contents(curves: Curves) -> list[Any]:
    return [curves.names, curves.steps, *(torch.nan_to_num(getattr(curves, name), nan=-7.0) for name in QUANTITIES)]


@pytest.mark.parametrize("per_step", [False, True])
@every_file
def test_a_file_gives_back_every_bit(name: str, writer: Any, per_step: bool, tmp_path: Path, seed: int) -> None:
    """Written in parts, nothing twice; a second run of the same name starts anew, a resumed one has its past too."""
    monitor, params = monitored(per_step)
    (tmp_path / name).write_text("what an older run left")
    file = writer(tmp_path / name)
    for steps in (0, 6, 1, 2, 0):
        go_on(monitor, params, steps)
        file.write(monitor)
    assert same_bits(contents(read_curves(tmp_path / name)), contents(monitor.curves))
    assert monitor.curves.steps == [0, 3, 6, 9]

    resumed, _ = monitored(per_step)
    resumed.load_state_dict(monitor.state_dict())
    file = writer(tmp_path / name)
    file.write(resumed)
    go_on(resumed, params, 3)
    file.write(resumed)
    assert same_bits(contents(read_curves(tmp_path / name)), contents(resumed.curves))
    resumed.reset()
    file.write(resumed)
    assert read_curves(tmp_path / name).steps == [0]


@every_file
def test_another_run_by_the_same_writer_starts_the_file_anew(name: str, writer: Any, tmp_path: Path, seed: int) -> None:
    """Also one that has come further than the first when it is written: its numbers are others."""
    file = writer(tmp_path / name)
    for steps in (3, 9):
        monitor, params = monitored()
        go_on(monitor, params, steps)
        file.write(monitor)
    assert same_bits(contents(read_curves(tmp_path / name)), contents(monitor.curves))


@every_file
def test_a_file_of_a_killed_run_gives_its_whole_lines(name: str, writer: Any, tmp_path: Path, seed: int) -> None:
    monitor, params = monitored()
    go_on(monitor, params, 6)
    writer(tmp_path / name).write(monitor)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: data.rindex(b"\n", 0, -1) + 3])
    curves = read_curves(tmp_path / name)
    last = monitor.names[:2] if name == "run.csv" else []
    assert curves.steps == ([0, 3, 6] if last else [0, 3])
    assert same_bits(torch.nan_to_num(curves.rotation[:2]), torch.nan_to_num(monitor.curves.rotation[:2]))
    assert [curves.of(each)[-1] for each in last] == [monitor.curves.of(each)[-1] for each in last]


def test_lines_are_plain_json(tmp_path: Path, seed: int) -> None:
    monitor, params = monitored(per_step=False)
    go_on(monitor, params, 3)
    params[1].data[0, 0] = math.inf
    go_on(monitor, params[:1], 3)
    JsonLinesWriter(tmp_path / "run.jsonl").write(monitor)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    rows = [
        json.loads(line, parse_constant=refuse)
        for line in (tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert [set(row) for row in rows] == [{"step", "rotation", "norm"}] * 3
    first, second, zero = monitor.names
    assert rows[1]["rotation"] == {first: monitor.curves.of(first)[1], second: monitor.curves.of(second)[1], zero: None}
    assert rows[2]["norm"]["ü.weight"] is None


class Recording:
    """What TensorBoard would be told."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.figures: list[tuple[Figure, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def add_figure(self, tag: str, figure: Figure, step: int, close: bool) -> None:
        self.figures.append((figure, step))


def test_tensorboard_gets_scalars_once_and_the_figure(seed: int) -> None:
    monitor, params = monitored()
    target = Recording()
    writer = TensorBoardWriter(target, quantities=("rotation", "norm"))
    for steps in (3, 0, 3):
        go_on(monitor, params, steps)
        writer.write(monitor)
    writer.close()
    curves = monitor.curves
    expected = [
        (f"{quantity}/{name}", getattr(curves, quantity)[row, layer].item(), step)
        for row, step in enumerate((0, 3, 6))
        for quantity in ("rotation", "norm")
        for layer, name in enumerate(monitor.names)
    ]
    assert str(target.scalars) == str(expected)
    assert [step for _, step in target.figures] == [3, 6]
    with pytest.raises(ValueError, match="quantities='speed' is unknown"):
        TensorBoardWriter(target, quantities=("speed",))


def test_without_tensorboard_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoardWriter(tmp_path)


@every_file
def test_the_command_draws_a_file(
    name: str, writer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    monitor, params = monitored()
    go_on(monitor, params, 6)
    writer(tmp_path / name).write(monitor)
    assert __main__.main(["plot", str(tmp_path / name)]) == 0
    assert "3 layers over 3 records" in capsys.readouterr().out
    picture = matplotlib.image.imread(tmp_path / "run.png")
    argv = ["plot", str(tmp_path / name), "--quantity", "angle", "--title", "Adam", "--xlabel", "epoch"]
    assert __main__.main([*argv, "--out", str(tmp_path / "angles.png")]) == 0
    other = matplotlib.image.imread(tmp_path / "angles.png")
    assert picture.shape == other.shape
    assert (picture != other).any()


BAD_FILES = {
    "empty": ("", "holds no records"),
    "text": ("what is this\n", "holds no rotation curves"),
    "other JSON": ('{"loss": 3}\n', "holds no rotation curves"),
    "JSON of the wrong form": ('{"step": 3, "rotation": 5}\n', "holds no rotation curves"),
}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_the_command_says_what_is_wrong_with_a_file(
    text: str, message: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_text(text)
    assert __main__.main(["plot", str(path)]) == 1
    printed = capsys.readouterr().err
    assert str(path) in printed
    assert message in printed
    assert not (tmp_path / "bad.png").exists()


def test_folders_that_are_not_there_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for writer in FILES.values():
        with pytest.raises(ValueError, match="must be a file in a folder that exists"):
            writer(tmp_path / "nowhere" / "run.csv")
    assert __main__.main(["plot", str(tmp_path / "none.csv"), "--out", str(tmp_path / "a.png")]) == 1
    assert "none.csv" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        __main__.main(["plot", "run.csv", "--out", str(tmp_path / "nowhere" / "a.png")])
