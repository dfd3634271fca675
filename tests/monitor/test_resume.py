"""RotationMonitor.state_dict: a resumed curve is the uninterrupted one, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layca_fast import RotationMonitor
from layca_fast.monitor.curves import QUANTITIES
from layca_fast.monitor.keeping import KEEPS

from ..support import copy_of, random_gradients, same_bits, train


def everything(monitor: RotationMonitor) -> Any:
    curves = monitor.curves
    return [curves.names, curves.steps, *(getattr(curves, name) for name in QUANTITIES), copy_of(monitor.state_dict())]


@pytest.mark.parametrize("keep", KEEPS)
def test_a_resumed_curve_is_the_uninterrupted_one(keep: str, tmp_path: Path, seed: int) -> None:
    """Saved between two records and in its middle, loaded by another process's monitor of other weights."""
    options = {"keep": keep, "per_step": keep != "bfloat16", "every": 2, "sketch_size": 50}
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    gradients = random_gradients(list(model.parameters()), 7)
    whole = RotationMonitor(model, **options).attach(optimizer)
    train(optimizer, gradients[:3])
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "monitor": whole.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    train(optimizer, gradients[3:])

    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    twin = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7))
    resumed = RotationMonitor(twin, **options)
    twin.load_state_dict(loaded["model"])
    follower = torch.optim.Adam(twin.parameters(), 0.05)
    follower.load_state_dict(loaded["optimizer"])
    resumed.load_state_dict(loaded["monitor"])
    for tensor in loaded["monitor"]["start"]:
        tensor.fill_(7.0)
    with resumed.attach(follower):
        train(follower, gradients[3:])
    assert whole.curves.steps == [0, 2, 4, 6]
    assert same_bits(everything(resumed), everything(whole))


@pytest.mark.parametrize("keep", KEEPS)
def test_weights_that_were_cast_are_compared_with_the_initial_ones_as_they_were(keep: str, seed: int) -> None:
    """Also after a resume, whose monitor is made of weights of the new type."""
    model = nn.Linear(9, 8)
    options = {"keep": keep, "per_step": keep != "bfloat16", "sketch_size": 50}
    monitor = RotationMonitor(model, **options)
    model.bfloat16()
    monitor.record()
    resumed = RotationMonitor(model, **options)
    resumed.load_state_dict(monitor.state_dict())
    for each in (monitor, resumed):
        each.record()
    assert same_bits(everything(resumed), everything(monitor))


CHANGES: dict[str, tuple[Any, str]] = {
    "layers": (lambda model: RotationMonitor(model[:1]), "names=.*make it as the other was made"),
    "keep": (lambda model: RotationMonitor(model, keep="cpu"), "keep='device'.*keep='cpu'"),
    "per step": (lambda model: RotationMonitor(model, per_step=True), "per_step=False.*per_step=True"),
    "seed": (lambda model: RotationMonitor(model, seed=1), "seed=0.*seed=1"),
    "shapes": (
        lambda model: RotationMonitor(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))),
        r"of shapes \[\(4, 3\), \(2, 4\)\], but those watched here have \[\(4, 3\), \(5, 4\)\]",
    ),
}


@pytest.mark.parametrize(("make", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_states_of_other_monitors_are_refused_before_anything_changes(make: Any, message: str, seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    state = RotationMonitor(model).state_dict()
    other = make(model)
    before = everything(other)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="version 99"):
        other.load_state_dict({**state, "version": 99})
    assert same_bits(everything(other), before)
