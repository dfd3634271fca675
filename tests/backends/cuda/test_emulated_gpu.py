"""The emulated GPU: the order of its threads changes no bit, and it notices what a GPU would not forgive."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from layca_fast.backends.cuda import BACKEND
from layca_fast.formulas.bases import FORMULAS

from ...sanitize.__main__ import library
from ...support import HANGS, same_bits
from ..cpu.support import ROOT, build, keep_formulas
from . import test_emulator, test_halves
from .support import driver_of, emulated, emulator  # noqa: F401

#: The emulator takes a minute to build.
pytestmark = pytest.mark.exhaustive

has_sanitizers = pytest.mark.skipif(
    not Path(library("libtsan.so")).is_absolute(), reason="the compiler has no sanitizers here"
)

#: Every type of weights, and every type of what goes with 16-bit ones.
KINDS = [torch.float32, torch.float64, *test_halves.KINDS]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_order_of_blocks_warps_and_threads_changes_no_bit(
    kind: torch.dtype | test_halves.Kinds,
    emulator: ModuleType,  # noqa: F811
    seed: int,
) -> None:
    """Of all formulas, and a layer whose sums are taken again, in eight orders each."""
    driver = driver_of(emulator)
    for formula in FORMULAS:
        if isinstance(kind, torch.dtype):
            first = test_emulator.random_batch(formula, [(3, 700), (40,), (BACKEND.tile, 3), (1, 1)], kind)
            first.grads[0] = first.params[0] + 1e-4 * torch.randn_like(first.params[0])
            first.refresh()
            twins = [test_emulator.twin(first) for _ in range(7)]
            results: Callable[..., list[object]] = test_emulator.results
        else:
            first = test_halves.random_batch(formula, kind, 1 + BACKEND.tile, 2)
            twins = [test_halves.twin(first, kind) for _ in range(3)]
            results = test_halves.results
        for number, batch in enumerate([first, *twins]):
            driver.layca_emulator_seed(ctypes.c_uint64(seed + number))
            BACKEND.step(batch)
        for batch in twins:
            assert same_bits(results(batch), results(first)), formula


#: Of csrc/cuda: what is replaced by what, and what is then said.
FAULTS = {
    "no barrier between warps": (
        "of_warp[warp] = sums;\n  __syncthreads();",
        "of_warp[warp] = sums;",
        "made other numbers",
    ),
    "a barrier that some threads do not reach": (
        "of_warp[warp] = sums;\n  __syncthreads();",
        "of_warp[warp] = sums;\n  if (warp < 3) __syncthreads();",
        "its block",
    ),
    "a tile beyond the last": (
        "const TileSpan tile = tile_span(batch, blockIdx.x);",
        "const TileSpan tile = tile_span(batch, blockIdx.x + 1);",
        "ERROR: AddressSanitizer",
    ),
    "more warps than shared memory has room for": (
        "Sums[warps]",
        "Sums[warps - 1]",
        "ERROR: AddressSanitizer",
    ),
}
#: What shows to ThreadSanitizer alone, whatever comes first.
RACES = {
    "no barrier between warps": FAULTS["no barrier between warps"][:2],
    "two blocks on one tile": ("gridDim.x - 1 - blockIdx.x", "blockIdx.x / 2"),
}


def with_fault(folder: Path, old: str, new: str, rounds: int, sanitizer: str) -> subprocess.CompletedProcess[str]:
    """The driver of csrc/cuda/emulator, run with such kernels of plain SGD."""
    source = folder / "csrc"
    if not source.exists():
        shutil.copytree(ROOT / "csrc", source)
        keep_formulas(source, "Sgd")
    text = (ROOT / "csrc" / "cuda" / "kernels.cuh").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (source / "cuda" / "kernels.cuh").write_text(text.replace(old, new), encoding="utf-8")
    build(folder / "build", "race_driver", source, LAYCA_SANITIZE=sanitizer)
    command = [str(folder / "build" / "race_driver"), "sgd", str(rounds)]
    # A thread that a fault has stopped keeps what it had.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)


@has_sanitizers
def test_faults_of_kernels_are_noticed(tmp_path: Path) -> None:
    """In two orders; without a fault there is nothing to notice."""
    assert with_fault(tmp_path, "sum_block(Sums& sums) {", "sum_block(Sums& sums) {", 2, "address").returncode == 0
    for name, (old, new, message) in FAULTS.items():
        done = with_fault(tmp_path, old, new, 2, "address")
        assert done.returncode == 1, name
        assert message in done.stderr, name


@has_sanitizers
def test_races_are_noticed_whatever_comes_first(tmp_path: Path) -> None:
    for name, (old, new) in RACES.items():
        done = with_fault(tmp_path, old, new, 1, "thread")
        assert "ThreadSanitizer: data race" in done.stderr, name
