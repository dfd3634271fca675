"""What makes wheels and the table of versions: what it refuses, and what it writes."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from release import versions, wheel

NEEDED = ("setup.py", "pyproject.toml", "LICENSE", "csrc/CMakeLists.txt", "layca_fast/version.py", "tests/conftest.py")


def sdist_of(folder: Path, *names: str) -> Path:
    path = folder / "layca_fast-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"layca_fast-1.0/{name}"), io.BytesIO())
    return path


@pytest.mark.parametrize(
    "stray",
    [
        *("site/index.html", ".venv/x.py", ".git/config", ".benchmarks/a", "layca_fast/_cpu.so", "tests/a.pyc"),
        *("release/cuda/build/x.py", "release/cuda/layca_fast_cuda.egg-info/PKG-INFO", "docs/page.md~", "dist/a.whl"),
    ],
)
def test_an_sdist_with_strays_is_refused(stray: str, tmp_path: Path) -> None:
    wheel.check_sdist(sdist_of(tmp_path, *NEEDED, "layca_fast.egg-info/PKG-INFO"))
    with pytest.raises(RuntimeError, match="do not belong there") as found:
        wheel.check_sdist(sdist_of(tmp_path, *NEEDED, stray))
    assert stray in str(found.value)


@pytest.mark.parametrize("missing", NEEDED)
def test_an_sdist_without_what_a_build_needs_is_refused(missing: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="lacks") as found:
        wheel.check_sdist(sdist_of(tmp_path, *(name for name in NEEDED if name != missing)))
    assert missing in str(found.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layca_fast/_cpu.x.so", "tests/conftest.py"], "do not belong there"),
        (["layca_fast/_cpu.x.so", "layca_fast.libs/libgomp.so"], "do not belong there"),
        (["layca_fast/optimizer.py"], "has no _cpu"),
        (["layca_fast/_cpu.x.so"], "without OpenMP"),
    ],
)
def test_a_wheel_that_is_not_whole_is_refused(names: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "layca_fast-1.0-cp311-cp311-manylinux_2_34_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"no OpenMP in here")
    with pytest.raises(RuntimeError, match=message):
        wheel.check_wheel(path, "layca_fast")


ROWS = (
    "| 3.9.2 | 2.6.0+cu124 | 3.2.0 (too old) | yes | 5 | 1 | 2026-01-01 |",
    "| 3.11.7 | 2.9.1 | 3.5.1 | yes | 6 | 1 | 2026-01-01 |",
    "| 3.11.7 | 2.13.0+cpu | 3.7.1 | yes | 7 | 1 | 2026-01-01 |",
)


def page_of(*rows: str) -> str:
    return "before\n" + versions.BEGIN + "\n".join([versions.HEAD, *rows]) + versions.END + "\nafter"


def test_a_run_replaces_its_row_and_rows_are_in_order() -> None:
    page = page_of()
    for python, torch, row in (("3.11", "2.13.0", ROWS[2]), ("3.9", "2.6.0", ROWS[0]), ("3.11", "2.9.1", ROWS[1])):
        page = versions.written(page, python, torch, row)
    assert page == page_of(*ROWS)
    newer = ROWS[1].replace("3.11.7", "3.11.8").replace("| 6 |", "| 9 |")
    assert versions.written(page, "3.11", "2.9.1", newer) == page_of(ROWS[0], ROWS[2], newer)


def test_a_run_that_fails_takes_its_row_away() -> None:
    assert versions.written(page_of(*ROWS), "3.11", "2.13.0", None) == page_of(*ROWS[:2])
