"""How many instructions a step of a fixed batch takes, under valgrind: a guard of speed that does not depend on time.

``python -m tests.test_instructions`` prints what to write into ``instructions.json`` after a change that is meant.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[1]
COMMITTED = json.loads((ROOT / "tests" / "instructions.json").read_text(encoding="utf-8"))
VALGRIND = shutil.which("valgrind")
#: What is counted: of several threads valgrind would count their waiting, too.
COUNTED = "layca::cpu::Runner::step(int)"


def tool(name: str) -> str:
    """A program of this environment, else of the system."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name) or name


def compiler() -> str:
    """The compiler that CMake takes, with its major version; a newer one makes other instructions."""
    found = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"(\d+)\.\d+\.\d+", found)
    return f"{'GNU' if 'Free Software' in found else 'other'} {version.group(1) if version else '?'}"


def build(folder: str) -> Path:
    options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    options += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (["-S", str(ROOT / "csrc"), "-B", folder, *options], ["--build", folder, "--target", "step_driver"]):
        subprocess.run([tool("cmake"), *command], check=True, capture_output=True, text=True)
    return Path(folder) / "step_driver"


def count(driver: Path, formula: str) -> int:
    command = [str(VALGRIND), "--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"]
    run = subprocess.run(
        [*command, f"--toggle-collect={COUNTED}", str(driver), formula], capture_output=True, text=True, check=True
    )
    assert re.search(r"\b(\d+) of \1 layers moved", run.stdout), run.stdout
    collected = re.search(r"Collected : (\d+)", run.stderr)
    assert collected, run.stderr
    return int(collected.group(1))


@pytest.mark.skipif(VALGRIND is None, reason="valgrind is not installed")
@pytest.mark.skipif(compiler() != COMMITTED["compiler"], reason=f"the counts are those of {COMMITTED['compiler']}")
def test_a_step_takes_as_many_instructions_as_it_did(tmp_path: Path) -> None:
    driver = build(str(tmp_path))
    counts = {formula: count(driver, formula) for formula in COMMITTED["instructions"]}
    assert counts == pytest.approx(COMMITTED["instructions"], rel=0.05)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = build(folder)
        counted = {formula: count(made, formula) for formula in COMMITTED["instructions"]}
    print(json.dumps({"compiler": compiler(), "instructions": counted}, indent=2))
