"""RotationMonitor of DTensors, on two processes: the curves are those of the whole tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..support import HANGS
from .sharded_worker import WORLD


@pytest.mark.skipif(sys.platform != "linux", reason="gloo, the transport between processes without GPUs, is Linux's")
def test_shards_add_up_to_the_whole(tmp_path: Path, seed: int) -> None:
    """Uneven and empty shards, replicas counted once, every ``keep``, FSDP2 with a resume, refusals: see the worker."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.monitor.sharded_worker", str(tmp_path), str(rank), str(seed)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        printed = [worker.communicate(timeout=HANGS)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, text in zip(workers, printed, strict=True):
        assert worker.returncode == 0, text
        assert "all checks passed" in text
