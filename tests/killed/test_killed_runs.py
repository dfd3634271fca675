"""A run that is killed again and again, at any moment, ends in the bits of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ..support import native_backends, same_bits
from .worker import STEPS, make, step

KILLS = 6
#: Of a life that is to be killed: all of them together are not the whole run, however late a kill comes.
MOST_STEPS = STEPS // KILLS - 1


@pytest.fixture(scope="module")
def worker() -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.killed.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def read(worker: "subprocess.Popen[str]", word: str) -> list[int]:
    """The numbers of the next line, which is to begin with ``word``."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    assert line.startswith(word), line
    return [int(number) for number in line.split()[1:]]


def live(worker: "subprocess.Popen[str]", task: str, steps: int) -> tuple[int, int]:
    """Begin a life of the run. Returns the steps that were done before it, and its process."""
    assert worker.stdin is not None
    worker.stdin.write(f"{task} {steps}\n")
    worker.stdin.flush()
    done, process = read(worker, "from")
    return done, process


def end(worker: "subprocess.Popen[str]") -> int:
    """How the life ended, whatever it still said before that."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("ended"):
            return int(line.split()[1])
    raise AssertionError("the worker is gone")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork, or kill a process without its notice")
@native_backends
def test_a_killed_run_resumes_bit_for_bit(
    backend: str, seed: int, tmp_path: Path, worker: "subprocess.Popen[str]"
) -> None:
    task = f"{tmp_path} {backend} {seed}"
    moments, starts = random.Random(seed), []
    for _ in range(KILLS):
        done, process = live(worker, task, MOST_STEPS)
        starts.append(done)
        for _ in range(moments.randint(1, MOST_STEPS - 2)):
            began = time.monotonic()
            read(worker, "step")
        # Any moment of the next step and of its checkpoint.
        time.sleep(moments.uniform(0.0, 1.2) * (time.monotonic() - began))
        os.kill(process, signal.SIGKILL)
        assert end(worker) == -signal.SIGKILL
    done, _ = live(worker, task, STEPS)
    assert starts == sorted(set(starts))
    assert 0 == starts[0] < starts[-1] < done < STEPS
    assert end(worker) == 0
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
