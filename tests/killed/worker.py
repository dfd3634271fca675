"""Training runs that write a checkpoint after every step and go on from the last: for test_killed_runs.py to kill.

``python -m tests.killed.worker`` gives birth to one for each line ``FOLDER BACKEND SEED STEPS`` of its input. A process
of its own, because it forks, which one that has started threads must not; what it imports serves all runs.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layca_fast import FusedLayca

STEPS = 60


def make(backend: str, seed: int) -> tuple[nn.Module, FusedLayca]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    model[2].bfloat16()
    groups = [
        {"params": [model[0].weight, model[2].weight], "base": "adam", "amsgrad": True, "chunks": 2},
        {"params": [model[0].bias, model[2].bias], "momentum": 0.9, "dampening": 0.2},
    ]
    return model, FusedLayca(groups, 0.02, backend=backend)


def step(model: nn.Module, optimizer: FusedLayca, seed: int, number: int) -> None:
    """The same in every life of the run."""
    inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed + number))
    for group in optimizer.param_groups:
        group["lr"] = 0.02 / (1 + number % 10)
    optimizer.zero_grad()
    model[2](model[:2](inputs).bfloat16()).float().square().mean().backward()
    optimizer.step()


def save(content: dict[str, Any], path: Path) -> None:
    """All of it or nothing, whenever the process dies."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(content, unfinished)
    unfinished.replace(path)


def run(folder: Path, backend: str, seed: int, steps: int) -> None:
    """Train from the last checkpoint on, ``steps`` steps at most; whoever is not done then waits to be killed."""
    model, optimizer = make(backend, seed)
    path, done = folder / "checkpoint.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    print("from", done, os.getpid(), flush=True)
    for number in range(done, min(done + steps, STEPS)):
        step(model, optimizer, seed, number)
        save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": number + 1}, path)
        print("step", number, flush=True)
    while done + steps < STEPS:
        time.sleep(1)


def warm_up() -> None:
    """A first step imports seconds' worth of modules: here, once for all runs. Without autograd, which has threads."""
    model, optimizer = make("cpu", 0)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()


def main() -> None:
    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        folder, backend, seed, steps = line.split()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(Path(folder), backend, int(seed), int(steps))
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print("ended", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
