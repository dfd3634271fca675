"""Layers that are shared out over processes take the steps of whole ones: the other sharded_*.py say what that is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .sharded_support import names
from .sharded_worker import WORLDS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[int, list[dict[str, str]]]:
    """What each case raised on each rank, by world size."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "tests.sharded_worker", str(folder), str(pytestconfig.layca_seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    found: dict[int, list[dict[str, str]]] = {}
    for world in WORLDS:
        files = [folder / f"{world}-{rank}.json" for rank in range(world)]
        found[world] = [json.loads(file.read_text()) if file.exists() else {"": done.stderr[-3000:]} for file in files]
    return found


@pytest.mark.parametrize(("world", "case"), names())
def test_on_real_processes(outcomes: dict[int, list[dict[str, str]]], world: int, case: str) -> None:
    for rank, outcome in enumerate(outcomes[world]):
        if outcome.get(case) != "":
            pytest.fail(f"rank {rank}: {outcome.get(case, 'did not come to it')}", pytrace=False)
