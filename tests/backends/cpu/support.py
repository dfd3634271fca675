"""Building targets of csrc/ that are not installed, and what compiled code tells of itself without being run."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from json import dumps
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch

from layca_fast.formulas.bases import Formula
from layca_fast.formulas.tables import MAX_OPTIONS

ROOT = Path(__file__).parents[3]


def tool(name: str) -> str:
    """A program of this environment, else of the system."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name) or name


def keep_formulas(source: Path, *types: str) -> None:
    """Leave only these C++ types in the list of formulas of a copy of csrc/, for a build in a tenth of the time."""
    file = source / "base_steps.h"
    text, lists = re.subn(
        r"(using Formulas = FormulaList<)[^;]*>;", rf"\1{', '.join(types)}>;", file.read_text("utf-8")
    )
    assert lists == 1
    file.write_text(text, encoding="utf-8")


def build(folder: Path, target: str, source: Path = ROOT / "csrc", **more: str) -> None:
    """Build a target of csrc/CMakeLists.txt that needs no CUDA, with the options of the modules, in ``folder``."""
    options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DLAYCA_CUDA=OFF"]
    options += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    options += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *(f"-D{name}={value}" for name, value in more.items())]
    configure = ["-S", str(source), "-B", str(folder), *options]
    for command in (configure, ["--build", str(folder), "--target", target]):
        done = subprocess.run([tool("cmake"), *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def build_once(paths: pytest.TempPathFactory, target: str) -> Path:
    """The folder of a target that one process of pytest-xdist builds for all of them."""
    base = paths.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / target
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob(f"{target}.*")):
            build(folder, target)
    return folder


def resource_usage(cuobjdump: str, file: Path) -> dict[tuple[str, str], dict[str, int]]:
    """REG, STACK, SHARED, LOCAL of every (function, architecture) in a file of compiled CUDA code."""
    text = subprocess.run([cuobjdump, "-res-usage", str(file)], check=True, capture_output=True, text=True).stdout
    found: dict[tuple[str, str], dict[str, int]] = {}
    architecture = function = ""
    for line in text.splitlines():
        if match := re.search(r"\barch = (\w+)", line):
            architecture = match.group(1)
        elif match := re.search(r"Function (\S+?):", line):
            function = match.group(1)
        if " REG:" in line:
            found[function, architecture] = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


def disassembly(cuobjdump: str, file: Path, architecture: str) -> dict[str, str]:
    """The machine code of every function in a file of compiled CUDA code."""
    command = [cuobjdump, "-sass", "-arch", architecture, str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    _, *parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def as_json_lines(head: Mapping[str, str], table: str, rows: Iterable[tuple[str, Any]]) -> str:
    """A JSON object of ``head`` and of ``table``, one line for each of its rows: what is committed and compared."""
    lines = [f"  {dumps(name)}: {dumps(value)}," for name, value in head.items()]
    cells = ",\n".join(f"    {dumps(name)}: {dumps(value)}" for name, value in rows)
    return "\n".join(["{", *lines, f"  {dumps(table)}: {{", cells, "  }", "}"])


def states_read(formula: Formula) -> int:
    """How many of its states the step of a formula reads: the compiler leaves out the loads of the others."""
    read = set()

    class Watched(tuple):
        def __getitem__(self, index: int) -> Any:
            read.add(index)
            return super().__getitem__(index)

    one = torch.ones(())
    formula.step(one, Watched([one] * len(formula.states)), [one] * MAX_OPTIONS)
    return len(read)
