"""A training run that writes a checkpoint after every step and goes on from the last: for test_killed_runs.py to kill.

``python -m tests.killed_worker FOLDER BACKEND SEED``
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layca_fast import FusedLayca

STEPS = 300


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


def main(folder: Path, backend: str, seed: int) -> None:
    torch.set_num_threads(1)
    model, optimizer = make(backend, seed)
    path, done = folder / "checkpoint.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    print("from", done, flush=True)
    for number in range(done, STEPS):
        step(model, optimizer, seed, number)
        save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": number + 1}, path)
        # Long enough for a run to be killed in its middle, whatever the machine.
        time.sleep(0.003)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
