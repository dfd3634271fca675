"""The Triton kernels compiled ahead of time, without a GPU: spills, vectors, and what must not be optimized away.

``python -m tests.backends.triton.test_compile`` prints what ``resources.json`` is to hold after a
change that is meant.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from layca_fast.formulas.bases import FORMULAS

from ...support import HANGS
from ..cpu.support import as_json_lines

pytest.importorskip("triton")
pytestmark = pytest.mark.exhaustive

ROOT = Path(__file__).parents[3]
#: Two processes of about equal work.
TARGETS = (("sm_90",), ("sm_80", "gfx942"))


COMMITTED = json.loads((ROOT / "tests" / "backends" / "triton" / "resources.json").read_text(encoding="utf-8"))
TRITON = version("triton")


def compile_all(cache: Path) -> dict[str, dict[str, Any]]:
    """What compile_worker.py prints, for every launch and target."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    printed: dict[str, dict[str, Any]] = {}
    with ExitStack() as ending:
        workers = []
        for targets in TARGETS:
            # A worker ends when its standard input does: with this process, whatever ends that.
            worker = subprocess.Popen(
                [sys.executable, "-m", "tests.backends.triton.compile_worker", *targets],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            ending.enter_context(worker)
            ending.callback(worker.kill)
            workers.append(worker)
        for worker in workers:
            # Read by hand: communicate would close the input.
            assert worker.stdout is not None
            out = worker.stdout.read()
            assert worker.wait(HANGS) == 0, out
            printed |= json.loads(out.splitlines()[-1])
    return printed


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return compile_all(tmp_path_factory.mktemp("triton"))


def registers(reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Registers of a thread by launch and target; on AMD GPUs the vector registers."""
    table: dict[str, dict[str, int]] = {}
    for name, report in reports.items():
        launch, _, target = name.rpartition(" for ")
        table.setdefault(launch, {})[target] = report["registers"]
    return table


@pytest.mark.parametrize(("target", "common"), [("sm_80", 1), ("sm_90", 3), ("gfx942", 1)])
def test_every_kernel_compiles(reports: dict[str, dict[str, Any]], target: str, common: int) -> None:
    """Measure, rotate, the three forms of finish, and prepare where steps count, of each formula in its types."""
    types = {name: 6 if name in ("sgd_nesterov", "adam") else common for name in FORMULAS}
    kernels = sum((5 + formula.counts_steps) * types[name] for name, formula in FORMULAS.items())
    assert sum(name.endswith(f" for {target}") for name in reports) == kernels


def test_nothing_spills(reports: dict[str, dict[str, Any]]) -> None:
    """Neither registers to memory nor anything to a stack, but for the frame of finish's call to divide float64.

    ptxas makes slow cases of that division a subroutine, which saves up to four registers of its caller. There are a
    few divisions per layer.
    """
    frame = {"STACK": 16}
    spilled = {
        name: report["spills"]
        for name, report in reports.items()
        if any(count > frame.get(what, 0) * name.startswith("finish(") for what, count in report["spills"].items())
    }
    assert spilled == {}


@pytest.mark.skipif(
    COMMITTED["triton"] != TRITON,
    reason=f"the registers are those of Triton {COMMITTED['triton']}, and here is {TRITON}",
)
def test_kernels_use_the_registers_they_did(reports: dict[str, dict[str, Any]]) -> None:
    assert registers(reports) == COMMITTED["registers"]


@pytest.mark.parametrize("what", ["loads", "stores"])
def test_aligned_tiles_move_in_vectors_of_16_bytes(reports: dict[str, dict[str, Any]], what: str) -> None:
    """As many as it takes for all of them; more are tables read in vectors."""
    narrow = {name: report for name, report in reports.items() if report[what] < report["expected"].get(what, 0)}
    assert narrow == {}


def test_tests_for_finite_values_survive(reports: dict[str, dict[str, Any]]) -> None:
    """One for every cleaned element: a compiler that assumed finite values would drop them."""
    missing = {
        name: report for name, report in reports.items() if report["finite"] < report["expected"].get("finite", 0)
    }
    assert missing == {}


def test_no_denormals_are_flushed_and_no_roots_approximated(reports: dict[str, dict[str, Any]]) -> None:
    """Gradients at 1e-30 make float32 denormals in a step, and the reference is exact."""
    assert {name: report["inexact"] for name, report in reports.items() if report["inexact"]} == {}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rows = registers(compile_all(Path(folder)))
    print(as_json_lines({"triton": TRITON}, "registers", sorted(rows.items())))
