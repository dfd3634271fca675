"""A run that is killed again and again, at any moment, ends in the bits of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .killed_worker import STEPS, make, step
from .support import native_backends, same_bits

KILLS = 4


def first_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill a process without its notice")
@native_backends
def test_a_killed_run_resumes_bit_for_bit(backend: str, seed: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.killed_worker", str(tmp_path), backend, str(seed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    moments, starts = random.Random(seed), []
    for kill in range(KILLS + 1):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[1]
        ) as process:
            starts.append(int(first_line(process).split()[1]))
            if kill < KILLS:
                time.sleep(moments.uniform(0.0, 0.25))
                process.kill()
        assert process.returncode == (-signal.SIGKILL if kill < KILLS else 0)
    assert starts == sorted(starts)
    assert 0 == starts[0] < starts[-1] < STEPS, "the run was never killed in its middle"
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["done"] == STEPS

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, optimizer = make(backend, seed)
        for number in range(STEPS):
            step(model, optimizer, seed, number)
    finally:
        torch.set_num_threads(threads)
    assert same_bits(dict(saved["model"]), dict(model.state_dict()))
    assert sum("remainder" in state for state in saved["optimizer"]["state"].values()) == 2
    assert same_bits(saved["optimizer"]["state"], optimizer.state_dict()["state"])
