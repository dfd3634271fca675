"""The kernels run on torch's own team of threads, wherever torch has its OpenMP from."""

import subprocess
import sys
from pathlib import Path

import pytest

from ...support import HANGS

PROGRAM = """
import os, sys
import torch
from layca_fast import FusedLayca

def threads():
    return len(os.listdir("/proc/self/task"))

def runtimes():
    names = ("libgomp", "libiomp", "libomp")
    paths = {line.split()[-1] for line in open("/proc/self/maps") if any(name in line for name in names)}
    return len(paths)

torch.set_num_threads(1)
param = torch.nn.Parameter(torch.randn(3000, 3000))
param.grad = torch.randn(3000, 3000)
optimizer = FusedLayca([param], 0.03, momentum=0.9, backend="cpu")
optimizer.step()
alone = threads()
torch.set_num_threads(3)
work = {"torch": lambda: param.grad.mul_(2), "kernels": optimizer.step}
counts = []
for name in sys.argv[1:]:
    work[name]()
    counts.append(threads() - alone)
print(*counts, runtimes())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list a process's threads")
@pytest.mark.exhaustive
@pytest.mark.parametrize("order", [("torch", "kernels"), ("kernels", "torch")], ids="-".join)
def test_who_comes_first_starts_the_team_and_the_other_joins_it(order: tuple[str, str]) -> None:
    command = [sys.executable, "-c", PROGRAM, *order]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANGS)
    first, both, runtimes = map(int, done.stdout.split())
    assert (first, both, runtimes) == (2, 2, 1)
