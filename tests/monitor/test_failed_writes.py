"""Writers that fail: nothing is lost, nothing is made unreadable, and the error says which file and why."""

import errno
import random
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layca_fast import RotationMonitor
from layca_fast.callbacks.recorder import Recorder
from layca_fast.monitor import files
from layca_fast.monitor.reading import read_curves
from layca_fast.monitor.writers import CsvWriter, JsonLinesWriter, TensorBoardWriter

from ..support import same_bits

FILES = {"run.csv": CsvWriter, "run.jsonl": JsonLinesWriter}
every_file = pytest.mark.parametrize(("name", "writer"), FILES.items(), ids=FILES.keys())


def monitored() -> RotationMonitor:
    return RotationMonitor(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))


def go_on(monitor: RotationMonitor, steps: int = 3) -> None:
    for each in monitor._watched:
        each.param.data += 0.1 * torch.randn_like(each.param)
    for _ in range(steps):
        monitor.record()


def contents(path: Path) -> list[Any]:
    curves = read_curves(path)
    return [curves.names, curves.steps, curves.rotation, curves.norm]


def expected(monitor: RotationMonitor) -> list[Any]:
    curves = monitor.curves
    return [curves.names, curves.steps, curves.rotation, curves.norm]


@pytest.fixture
def full_disk() -> Iterator[Callable[[int | None], None]]:
    """Says how many bytes a file may have, by the system's own limit: None for as many as it likes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def allow(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield allow
    allow(None)
    signal.signal(signal.SIGXFSZ, handler)


@every_file
def test_a_write_that_fails_anywhere_is_made_up_for(
    name: str, writer: Any, tmp_path: Path, full_disk: Callable[[int | None], None], seed: int
) -> None:
    """A part of the records reaches the disk, of any length; several calls may fail in a row."""
    chance = random.Random(seed)
    for trial in range(20):
        path = tmp_path / f"{trial}-{name}"
        monitor, file = monitored(), writer(path)
        go_on(monitor)
        file.write(monitor)
        whole = path.read_bytes()
        for _ in range(chance.randrange(1, 4)):
            go_on(monitor)
            full_disk(len(whole) + chance.randrange(80))
            with pytest.raises(OSError, match=r"from step 4 on were not written") as raised:
                file.write(monitor)
            full_disk(None)
            assert raised.value.errno == errno.EFBIG
            assert raised.value.filename == str(path)
            assert path.read_bytes().startswith(whole)
            assert contents(path)[1][:4] == [0, 1, 2, 3]
        file.write(monitor)
        assert same_bits(contents(path), expected(monitor))
        go_on(monitor)
        file.write(monitor)
        assert same_bits(contents(path), expected(monitor))
        assert list(tmp_path.glob(f"*{trial}-{name}*")) == [path]
        path.unlink()


@every_file
def test_a_first_write_that_fails_leaves_an_older_file(
    name: str, writer: Any, tmp_path: Path, full_disk: Callable[[int | None], None], seed: int
) -> None:
    old = monitored()
    go_on(old)
    writer(tmp_path / name).write(old)
    before = (tmp_path / name).read_bytes()
    monitor, file = monitored(), writer(tmp_path / name)
    go_on(monitor)
    for size in (0, 1, 40):
        full_disk(size)
        with pytest.raises(OSError, match=r"from step 0 on were not written"):
            file.write(monitor)
        full_disk(None)
        assert (tmp_path / name).read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    file.write(monitor)
    assert same_bits(contents(tmp_path / name), expected(monitor))
    assert list(tmp_path.iterdir()) == [tmp_path / name]


@every_file
def test_a_folder_or_a_file_that_goes_away_is_followed(name: str, writer: Any, tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    monitor, file = monitored(), writer(folder / name)
    go_on(monitor)
    file.write(monitor)
    folder.rename(tmp_path / "moved")
    go_on(monitor)
    with pytest.raises(FileNotFoundError, match=name):
        file.write(monitor)
    folder.mkdir()
    file.write(monitor)
    assert same_bits(contents(folder / name), expected(monitor))
    (folder / name).unlink()
    go_on(monitor)
    file.write(monitor)
    assert same_bits(contents(folder / name), expected(monitor))
    (folder / name).write_bytes(b"")
    go_on(monitor)
    file.write(monitor)
    assert same_bits(contents(folder / name), expected(monitor))


@every_file
def test_links_and_permissions_stay(name: str, writer: Any, tmp_path: Path, seed: int) -> None:
    target, link = tmp_path / "real", tmp_path / name
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    monitor = monitored()
    writer(link).write(monitor)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert same_bits(contents(link), expected(monitor))


def test_a_file_in_a_folder_that_takes_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, whom no folder refuses."""
    path = tmp_path / "run.csv"
    path.write_bytes(b"old")

    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(errno.EACCES, "no", str(path))

    monkeypatch.setattr(files, "_write", refuse)
    files.replace(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(PermissionError):
        files.replace(tmp_path / "other.csv", b"new")


class Failing:
    """A SummaryWriter whose disk is full for a while."""

    def __init__(self) -> None:
        self.fails_at, self.scalars = -1, {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if len(self.scalars) == self.fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.scalars[tag, step] = value

    def add_figure(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("none was asked for")


def test_tensorboard_gets_what_it_missed(seed: int) -> None:
    monitor, target = monitored(), Failing()
    writer = TensorBoardWriter(target, figure=False)
    writer.write(monitor)
    go_on(monitor)
    target.fails_at = 5
    with pytest.raises(OSError, match="No space"):
        writer.write(monitor)
    target.fails_at = -1
    writer.write(monitor)
    curves = monitor.curves
    assert target.scalars == {
        (f"rotation/{layer}", step): curves.of(layer)[row]
        for row, step in enumerate(curves.steps)
        for layer in curves.names
    }


def test_one_writer_that_fails_does_not_keep_the_others_from_writing(tmp_path: Path, seed: int) -> None:
    model, target = nn.Linear(3, 4), Failing()
    target.fails_at = 0
    recorder = Recorder([TensorBoardWriter(target, figure=False), CsvWriter(tmp_path / "run.csv")], {})
    recorder.start(model, 0, None)
    recorder.record(1)
    with pytest.raises(OSError, match="No space"):
        recorder.write()
    assert read_curves(tmp_path / "run.csv").steps == [0, 1]
