"""The native module against the Python it serves, and installations on machines where it cannot be built."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from layca_fast import _cpu
from layca_fast.formulas import tables
from layca_fast.formulas.bases import FORMULAS

from ..support import HANGS
from .cpu.support import ROOT, keep_formulas

TABLES = (tables.Column, tables.Flag, tables.Hyper, tables.Layer, tables.Tile, tables.Count, tables.Coefficient)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_tables_have_the_same_columns_in_both_languages(table: type[tables.IntEnum]) -> None:
    assert _cpu.columns[table.__name__] == {column.name: column.value for column in table}


def test_no_table_is_known_to_one_language_only() -> None:
    assert set(_cpu.columns) == {table.__name__ for table in TABLES}


def test_every_formula_has_native_kernels() -> None:
    assert set(_cpu.formulas) == set(FORMULAS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what an installation reads, with nothing built in it, and with only one formula to build."""
    copy = tmp_path / "source"
    built = shutil.ignore_patterns("*.so", "*.pyd", "_build.json", "__pycache__")
    for folder in ("layca_fast", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=built)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, copy)
    keep_formulas(copy / "csrc", "Sgd")
    return copy


def isolation() -> list[str]:
    """Build with the tools of this environment if it has them: faster than pip's fresh environment."""
    try:
        here = [version(name) for name in ("setuptools", "pybind11", "cmake", "ninja")]
    except PackageNotFoundError:
        return []
    return ["--no-build-isolation"] if int(here[0].split(".")[0]) >= 77 else []


def install(source: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """pip install into a folder of its own."""
    target = source.parent / "installed"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check", *isolation()]
    done = subprocess.run(
        [*command, "--target", str(target), str(source)],
        env={**os.environ, "LAYCA_REQUIRE_NATIVE": "0", "LAYCA_CUDA": "OFF", **environment},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    return done, target


def reasons(installed: Path) -> dict[str, str]:
    """What ``backends()`` of that installation says, in a process of its own."""
    # The finder of an editable installation would add what the source tree holds.
    program = (
        "import json, sys; "
        "sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, '__module__', '').startswith('__editable__')]; "
        "import layca_fast; "
        "print(json.dumps([layca_fast.__file__, {k: v.reason for k, v in layca_fast.backends().items()}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=installed,
        capture_output=True,
        text=True,
        check=True,
        timeout=HANGS,
    )
    file, found = json.loads(done.stdout)
    assert Path(file).is_relative_to(installed)
    return found


def native_modules(installed: Path) -> list[str]:
    return [path.name.split(".")[0] for path in installed.rglob("_*.*") if path.suffix in (".so", ".pyd")]


def path_without_nvcc() -> str:
    """The PATH less every folder that has a CUDA compiler."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not (Path(folder) / "nvcc").exists())


def test_without_a_compiler_the_rest_is_installed_and_says_why(source: Path) -> None:
    # A module that an earlier build left in the source tree must not be packed beside the note that there is none.
    for name in ("_cpu", "_cuda"):
        (source / "layca_fast" / f"{name}.abi3.so").write_bytes(b"old")
    done, installed = install(source, CXX="/no/such/compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    assert native_modules(installed) == []
    found = reasons(installed)
    assert "CMake Error" in found["cpu"]
    assert "/no/such/compiler" in found["cpu"]
    assert "LAYCA_CUDA=OFF" in found["cuda"]
    assert found["torch"] == ""


@pytest.mark.exhaustive
def test_the_reason_is_the_first_error_of_the_compiler(source: Path) -> None:
    for file in (source / "csrc").rglob("*.cpp"):
        file.write_text('#include "broken_on_purpose.h"\n')
    done, installed = install(source)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "broken_on_purpose.h" in reasons(installed)["cpu"]


def test_a_native_module_that_is_required_fails_the_installation(source: Path) -> None:
    done, installed = install(source, CXX="/no/such/compiler", LAYCA_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "/no/such/compiler" in done.stdout + done.stderr
    assert not installed.exists()


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("c++", path=path_without_nvcc()) is None, reason="nvcc lies beside the C++ compiler")
def test_without_a_cuda_compiler_the_cpu_module_is_all_that_can_be_required(source: Path) -> None:
    environment = {"PATH": path_without_nvcc(), "CUDACXX": "", "LAYCA_CUDA": "AUTO", "LAYCA_REQUIRE_NATIVE": "1"}
    done, installed = install(source, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert native_modules(installed) == ["_cpu"]
    assert "put nvcc on the PATH" in reasons(installed)["cuda"]


@pytest.mark.exhaustive
def test_a_cuda_compiler_that_does_not_work_costs_the_cuda_module_only(source: Path) -> None:
    done, installed = install(source, LAYCA_CUDA="AUTO", CUDACXX="/no/such/nvcc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert native_modules(installed) == ["_cpu"]
    found = reasons(installed)
    assert found["cpu"] == ""
    assert "/no/such/nvcc" in found["cuda"]


@pytest.mark.exhaustive
def test_a_cuda_module_that_is_asked_for_and_required_fails_the_installation(source: Path) -> None:
    done, installed = install(source, LAYCA_CUDA="ON", CUDACXX="/no/such/nvcc", LAYCA_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "/no/such/nvcc" in done.stdout + done.stderr
    assert not installed.exists()
