"""Every tile and number of warps that a chooser may pick: the same steps under the interpreter, and compiled well."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from layca_fast.backends.triton.backend import BACKEND
from layca_fast.backends.triton.launches import TILE, TILE_WARPS
from layca_fast.formulas.bases import FORMULAS
from layca_fast.step.batch import Batch

from ...support import HANGS, relative_distance, same_bits
from ..cpu.support import ROOT
from . import test_launches
from .choices import CHOICES, TARGETS, table

pytest.importorskip("triton")
pytestmark = pytest.mark.exhaustive

TILES = sorted({tile for tile, _ in CHOICES} | {512, 4096})


def test_the_committed_choice_is_one_of_them() -> None:
    assert CHOICES[-1] == (TILE, TILE_WARPS)


@pytest.mark.parametrize("formula", FORMULAS)
def test_tiles_of_any_size_make_the_same_step(formula: str, seed: int) -> None:
    """States to the bit; weights as far as sums in another order let them."""
    shapes = ((5, 1000), (40,), (3, 3))
    params, grads = ([test_launches.random(*shape) for shape in shapes] for _ in range(2))
    first = test_launches.batch_of(params, list(grads), FORMULAS[formula])
    before = test_launches.twin(first)
    BACKEND.step(first)
    for tile in TILES:
        slots = test_launches.twin(before).slots
        batch = Batch(FORMULAS[formula], slots, tile)
        batch.grads = list(grads)
        batch.refresh()
        BACKEND.step(batch)
        assert same_bits(batch.states, first.states)
        for ours, theirs in zip(batch.params, first.params, strict=True):
            assert relative_distance(ours, theirs) <= 1e-6


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What choices.py prints: of every kernel in its table."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.backends.triton.choices"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr
    printed: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return printed


def test_every_target_gets_every_choice(reports: dict[str, dict[str, Any]]) -> None:
    assert set(reports) == set(map(str, table()))
    assert {(each.choice, each.target) for each in table()} == {(one, target) for one in CHOICES for target in TARGETS}


@pytest.mark.parametrize("what", ["loads", "stores"])
def test_tiles_move_in_vectors_of_16_bytes(reports: dict[str, dict[str, Any]], what: str) -> None:
    assert {name: each[what] for name, each in reports.items() if each[what] < each["expected"][what]} == {}


def test_nothing_spills(reports: dict[str, dict[str, Any]]) -> None:
    assert {name: each["spills"] for name, each in reports.items() if any(each["spills"].values())} == {}


def test_no_integer_of_64_bits_is_divided(reports: dict[str, dict[str, Any]]) -> None:
    """It takes a GPU a hundred instructions."""
    assert {name: each["divisions"] for name, each in reports.items() if each["divisions"]} == {}


def test_warps_are_those_of_the_target(reports: dict[str, dict[str, Any]]) -> None:
    """Of 32 lanes on NVIDIA's GPUs, of 64 on AMD's, in Triton's layouts and in what the hardware is told."""
    assert {name: each["lanes"] for name, each in reports.items() if set(each["lanes"]) != {each["warp"]}} == {}
    assert all(each["warp"] == (64 if " for gfx" in name else 32) for name, each in reports.items())
    assert all(len(each["lanes"]) == 1 + (" for gfx" in name) for name, each in reports.items())


def test_no_denormals_are_flushed_and_no_roots_approximated(reports: dict[str, dict[str, Any]]) -> None:
    assert {name: each["inexact"] for name, each in reports.items() if each["inexact"]} == {}
