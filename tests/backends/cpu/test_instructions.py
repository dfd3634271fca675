"""How many instructions a step of a fixed batch takes, under valgrind: a guard of speed that does not depend on time.

``python -m tests.backends.cpu.test_instructions`` prints what ``instructions.json`` is to
hold after a change that is meant.
"""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from .support import ROOT, build, keep_formulas

COMMITTED = json.loads((ROOT / "tests" / "backends" / "cpu" / "instructions.json").read_text(encoding="utf-8"))
#: What is counted, with the C++ types.
FORMULAS = {"sgd_momentum": "SgdMomentum", "adam": "Adam<false>"}
VALGRIND = shutil.which("valgrind")
#: Where: of several threads valgrind would count their waiting, too.
COUNTED = "layca::cpu::Runner::step(int)"


def compiler() -> str:
    """The compiler that CMake takes, with its major version; a newer one makes other instructions."""
    found = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"(\d+)\.\d+\.\d+", found)
    return f"{'GNU' if 'Free Software' in found else 'other'} {version.group(1) if version else '?'}"


def count(driver: Path, formula: str) -> int:
    command = [str(VALGRIND), "--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"]
    run = subprocess.run(
        [*command, f"--toggle-collect={COUNTED}", str(driver), formula], capture_output=True, text=True, check=True
    )
    assert re.search(r"\b(\d+) of \1 layers moved", run.stdout), run.stdout
    collected = re.search(r"Collected : (\d+)", run.stderr)
    assert collected, run.stderr
    return int(collected.group(1))


def count_all(folder: Path) -> dict[str, int]:
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    keep_formulas(folder / "csrc", *FORMULAS.values())
    build(folder / "built", "step_driver", folder / "csrc")
    return {formula: count(folder / "built" / "step_driver", formula) for formula in FORMULAS}


@pytest.mark.exhaustive
@pytest.mark.skipif(VALGRIND is None, reason="valgrind is not installed")
@pytest.mark.skipif(compiler() != COMMITTED["compiler"], reason=f"the counts are those of {COMMITTED['compiler']}")
def test_a_step_takes_as_many_instructions_as_it_did(tmp_path: Path) -> None:
    assert count_all(tmp_path) == pytest.approx(COMMITTED["instructions"], rel=0.05)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        counted = count_all(Path(folder))
    print(json.dumps({"compiler": compiler(), "instructions": counted}, indent=2))
