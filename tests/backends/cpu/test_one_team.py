"""The kernels run on torch's own team of threads, wherever torch has its OpenMP from."""

import subprocess
import sys
from pathlib import Path

import pytest

from ...support import HANGS

PROGRAM = """
import os
import torch
from layca_fast import FusedLayca, _cpu

def threads():
    return len(os.listdir("/proc/self/task"))

def teams():
    names = ("libgomp", "libiomp", "libomp")
    paths = {line.split()[-1] for line in open("/proc/self/maps") if any(name in line for name in names)}
    return len(paths)

torch.set_num_threads(3)
param = torch.nn.Parameter(torch.randn(3000, 3000))
param.grad = torch.randn(3000, 3000)
param.grad.mul_(2)
by_torch = threads()
optimizer = FusedLayca([param], 0.03, momentum=0.9, backend="cpu")
optimizer.step()
optimizer.step()
print(by_torch, threads(), teams())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list a process's threads")
def test_a_step_starts_no_threads_beside_torchs() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=HANGS)
    by_torch, after_steps, teams = map(int, done.stdout.split())
    # torch's team of three is there before the step, and the kernels' would add two.
    assert by_torch >= 3
    assert after_steps == by_torch
    assert teams == 1
