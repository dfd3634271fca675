"""The kernels as they are compiled for ARM, run in an emulator: the bits of a step are those of this processor."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ...support import HANGS
from .support import ROOT, tool

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        EMULATOR is None or shutil.which(COMPILER) is None,
        reason=f"{COMPILER} and qemu-aarch64 are not here (Debian: g++-aarch64-linux-gnu, qemu-user)",
    ),
]


def driver(folder: Path, *options: str) -> Path:
    """csrc/cpu/bits_driver.cpp, for one thread; without the Python modules nothing but a compiler is needed."""
    configure = ["-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [
        "-DLAYCA_MODULES=OFF",
        "-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        *options,
    ]
    for command in (configure, ["--build", str(folder), "--target", "bits_driver"]):
        done = subprocess.run([tool("cmake"), *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bits_driver"


def bits(command: list[str]) -> dict[str, set[str]]:
    """The hashes that a driver prints, of all its instruction sets, by formula and type."""
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANGS).stdout
    found: dict[str, set[str]] = {}
    for line in said.splitlines():
        formula, dtype, _, hash_of_bits = line.split()
        found.setdefault(f"{formula} {dtype}", set()).add(hash_of_bits)
    return found


def test_a_step_leaves_the_same_bits_on_arm(tmp_path: Path) -> None:
    """Weights, states, radii, dots, coefficients and counts, under every formula and type."""
    assert EMULATOR is not None
    # The baseline alone, in a third of the time: test_kernels.py compares the other instruction sets to it.
    here = bits([str(driver(tmp_path / "here", "-DLAYCA_X86_64_LEVELS=OFF"))])
    arm = driver(
        tmp_path / "arm",
        *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"),
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    assert len(here) >= 40
    assert all(len(hashes) == 1 for hashes in here.values())
    assert bits([EMULATOR, str(arm)]) == here
