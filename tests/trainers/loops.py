"""What the trainers are compared with: a small classifier, and a training loop written by hand."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layca_fast.commands.verify import angle_between, angle_tolerance, layers_of

from ..support import params_of

Batch = tuple[Tensor, Tensor]


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 5))


def labelled_points(batches: int) -> list[Batch]:
    """Batches of four points with their classes."""
    return [(torch.randn(4, 8), torch.randint(5, (4,))) for _ in range(batches)]


def overflowing_scaler() -> torch.amp.GradScaler:
    """Its scale grows so much after two steps that float16 gradients of the third are infinite, and falls again."""
    return torch.amp.GradScaler("cpu", 2.0**10, growth_factor=2.0**14, backoff_factor=2.0**-14, growth_interval=2)


def train_by_hand(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    batches: Sequence[Batch],
    accumulate: int = 1,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    pause: bool = False,
) -> list[bool]:
    """Train on the means of ``accumulate`` batches. Returns, for every step, whether ``scaler`` let it be taken.

    ``pause``: the schedule stands still where it did not.
    """
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    taken = []
    for first in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        for inputs, labels in batches[first : first + accumulate]:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = nn.functional.cross_entropy(model(inputs), labels)
            scaler.scale(loss / accumulate).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            assert not nn.utils.clip_grad_norm_(params_of(optimizer), clip) <= clip, "nothing to clip"
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        taken.append(scaler.get_scale() >= scale)
        if taken[-1] or not pause:
            scheduler.step()
    return taken


def assert_turned(before: Tensor, after: Tensor, rate: float) -> None:
    """By atan(rate), as precisely as ``python -m layca_fast verify`` asks."""
    angle = math.atan(rate)
    (old,), (new,) = layers_of(before, 1), layers_of(after, 1)
    tolerance = angle_tolerance(after.dtype, angle, after.numel())
    assert abs(angle_between(old, new) / angle - 1) <= tolerance


def rotating(optimizer: Optimizer) -> int:
    """How many tensors have turned, whoever turned them."""
    return sum("radius" in state for state in optimizer.state_dict()["state"].values())
