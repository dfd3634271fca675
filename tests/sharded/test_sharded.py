"""Layers that are shared out over processes take the steps of whole ones: the other sharded_*.py say what that is."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from .killed import LIVES, STEPS, optimizer_of, step
from .support import names, network, off
from .worker import WORLDS


@dataclass
class Run:
    """What became of the processes: what each case raised on each rank, by world size, and the folder they wrote to."""

    outcomes: dict[int, list[dict[str, str]]]
    folder: Path


def _run(folder: Path, seed: int, chosen: str) -> Run:
    command = [sys.executable, "-m", "tests.sharded.worker", str(folder), str(seed), chosen]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    found: dict[int, list[dict[str, str]]] = {}
    for world in WORLDS:
        files = [folder / f"{world}-{rank}.json" for rank in range(world)]
        found[world] = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(found, folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Run:
    return _run(tmp_path_factory.mktemp("sharded"), pytestconfig.layca_seed, "default")


@pytest.fixture(scope="module")
def exhaustive_run(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Run:
    return _run(tmp_path_factory.mktemp("sharded"), pytestconfig.layca_seed, "exhaustive")


def _check(run: Run, world: int, case: str) -> None:
    for rank, outcome in enumerate(run.outcomes[world]):
        if outcome.get(case) != "":
            pytest.fail(f"rank {rank}: {outcome.get(case, 'did not come to it')}", pytrace=False)


@pytest.mark.parametrize(("world", "case"), names("default"))
def test_on_real_processes(run: Run, world: int, case: str) -> None:
    _check(run, world, case)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("world", "case"), names("exhaustive"))
def test_on_other_numbers_of_processes(exhaustive_run: Run, world: int, case: str) -> None:
    _check(exhaustive_run, world, case)


def test_a_killed_run_goes_on_with_another_number_of_processes(run: Run, seed: int) -> None:
    folder = run.folder / "killed"
    starts = [json.loads((folder / f"from-{number}.json").read_text()) for number in range(len(LIVES))]
    assert 0 == starts[0] < starts[1] < starts[2] < STEPS
    torch.manual_seed(seed)
    model = network()
    optimizer = optimizer_of(model)
    for number in range(STEPS):
        step(model, optimizer, seed, number)
    assert off(torch.load(folder / "ends.pt"), list(model.parameters())) < 1e-6
