"""Training in mixed precision, as scripts and trainers write it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layca_fast import FusedLayca, layer_groups

from ..support import contents, copy_of, native_backends, params_of, same_bits, train

CLIP = 0.05
unscaling = pytest.mark.parametrize("unscale_in_step", [False, True], ids=["standard path", "unscaled in the step"])


def clusters() -> tuple[Tensor, Tensor]:
    """Points around five centres that a small network tells apart."""
    labels = torch.arange(5).repeat(20)
    return torch.randn(5, 8)[labels] + 0.3 * torch.randn(100, 8), labels


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 5))


BASES = (
    {"base": "sgd", "momentum": 0.9},
    {"base": "adam"},
    {"base": "lion"},
    {"base": "muon", "others_base": "adam", "others_lr": 0.01},
)


@pytest.mark.parametrize("options", BASES, ids=str)
@unscaling
@native_backends
def test_autocast_converges_as_float32_does(
    backend: str, unscale_in_step: bool, options: dict[str, Any], seed: int
) -> None:
    """Forward and backward in bfloat16, weights and steps in float32."""
    inputs, labels = clusters()
    start = network()
    finals = []
    for autocast in (False, True):
        model = copy.deepcopy(start)
        unscales = unscale_in_step and autocast
        optimizer = FusedLayca(layer_groups(model, 0.05, **options), backend=backend, unscale_in_step=unscales)
        rates = [group["lr"] for group in optimizer.param_groups]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=autocast)
        losses = []
        for number in range(100):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - number / 100)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(model(inputs), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            right = (model(inputs).argmax(1) == labels).float().mean()
        finals.append((losses[0], losses[-1], float(right)))
    (before, plain, plain_right), (_, mixed, mixed_right) = finals
    assert plain < 0.2 * before
    assert mixed < 0.2 * before
    assert abs(mixed - plain) < 0.05 * before
    assert abs(mixed_right - plain_right) <= 0.03


class PatchedOptimizer:
    """What accelerate makes of an optimizer: a wrapper that notices whether GradScaler has called its step."""

    def __init__(self, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.optimizer, self.scaler, self.skipped = optimizer, scaler, False
        self.original, self.called = optimizer.step, False
        self.patched = self.patch(optimizer.step)

    def patch(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            self.called = True
            return method(*args, **kwargs)

        return patched

    def step(self) -> None:
        self.optimizer.step = self.patched
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped, self.called = not self.called, False
        self.optimizer.step = self.original


def as_accelerate(model: nn.Module, optimizer: FusedLayca, scaler: torch.amp.GradScaler) -> Callable[[], None]:
    """``accelerator.clip_grad_norm_(...)`` unscales, then clips; the wrapped optimizer steps through the scaler."""
    wrapped = PatchedOptimizer(optimizer, scaler)

    def finish() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        wrapped.step()

    return finish


def as_lightning(model: nn.Module, optimizer: FusedLayca, scaler: torch.amp.GradScaler) -> Callable[[], None]:
    """Its precision plugin unscales after the closure, then clips; not where the optimizer unscales in its step."""

    def finish() -> None:
        handles_unscaling = getattr(optimizer, "_step_supports_amp_scaling", False)
        if handles_unscaling:
            raise RuntimeError("the current optimizer does not allow for gradient clipping")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()

    return finish


def by_value(model: nn.Module, optimizer: FusedLayca, scaler: torch.amp.GradScaler) -> Callable[[], None]:
    def finish() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_value_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()

    return finish


TRAINERS = (
    pytest.param(as_accelerate, False, id="accelerate"),
    pytest.param(as_accelerate, True, id="accelerate, unscaled in the step"),
    pytest.param(as_lightning, False, id="lightning"),
    pytest.param(by_value, False, id="by value"),
    pytest.param(by_value, True, id="by value, unscaled in the step"),
)


@pytest.mark.parametrize(("trainer", "unscale_in_step"), TRAINERS)
@native_backends
def test_clipped_steps_are_those_of_the_clipped_gradients(
    backend: str, trainer: Callable[..., Callable[[], None]], unscale_in_step: bool, seed: int
) -> None:
    """Under every trainer: as a plain optimizer's on gradients clipped by hand, and none where they are infinite."""
    inputs, labels = clusters()
    model = network()
    twin = copy.deepcopy(model)
    options = {"momentum": 0.9, "dampening": 0.2, "backend": backend}
    optimizer = FusedLayca(model.parameters(), 0.05, unscale_in_step=unscale_in_step, **options)
    plain = FusedLayca(twin.parameters(), 0.05, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    finish = trainer(model, optimizer, scaler)
    for number in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(inputs), labels)
        scaler.scale(loss).backward()
        if number in (0, 4):
            model[0].weight.grad[1, 1] = float("inf")
        row = [param.grad / scaler.get_scale() for param in model.parameters()]
        before = copy_of(params_of(optimizer))
        finish()
        if number in (0, 4):
            assert same_bits(copy_of(params_of(optimizer)), before)
            continue
        assert all(torch.isfinite(grad).all() for grad in row)
        for param, grad in zip(twin.parameters(), row, strict=True):
            param.grad = grad
        if trainer is by_value:
            nn.utils.clip_grad_value_(twin.parameters(), CLIP)
        else:
            assert nn.utils.clip_grad_norm_(twin.parameters(), CLIP) > CLIP
        train(plain, [[param.grad for param in twin.parameters()]])
        assert same_bits(contents(optimizer), contents(plain))
