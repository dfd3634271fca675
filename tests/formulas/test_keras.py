"""Trajectories of the published Keras optimizers, written down anew from their formulas in numpy.

Keras differs from torch where it does not matter to a rotation at a constant lr: SGD keeps lr inside its velocity, Adam
folds its bias correction into lr (so its eps is another), layers return to the norm that they had before the step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from layca_fast import FusedLayca

from ..support import device_of, every_backend

EPSILON = 1e-7
Array = np.ndarray[Any, np.dtype[np.float64]]
Slots = dict[str, Any]


def average(slots: Slots, name: str, value: Array, decay: float) -> Array:
    slots[name] = decay * slots.get(name, 0.0) + (1 - decay) * value
    return slots[name]


def sgd(g: Array, slots: Slots, lr: float, momentum: float = 0.0, nesterov: bool = False) -> Array:
    slots["v"] = momentum * slots.get("v", 0.0) - lr * g
    change: Array = momentum * slots["v"] - lr * g if nesterov else slots["v"]
    return -change


def sgd_amom(g: Array, slots: Slots, lr: float, momentum: float = 0.9) -> Array:
    return lr * average(slots, "m", g, momentum)


def rmsprop(g: Array, slots: Slots, lr: float) -> Array:
    return lr * g / (np.sqrt(average(slots, "a", g * g, 0.9)) + EPSILON)


def adagrad(g: Array, slots: Slots, lr: float) -> Array:
    slots["a"] = slots.get("a", 0.0) + g * g
    return lr * g / (np.sqrt(slots["a"]) + EPSILON)


def adam(g: Array, slots: Slots, lr: float, amsgrad: bool = False) -> Array:
    slots["t"] = slots.get("t", 0) + 1
    corrected = lr * np.sqrt(1 - 0.999 ** slots["t"]) / (1 - 0.9 ** slots["t"])
    m, v = average(slots, "m", g, 0.9), average(slots, "v", g * g, 0.999)
    if amsgrad:
        slots["vhat"] = v = np.maximum(slots.get("vhat", 0.0), v)
    return corrected * m / (np.sqrt(v) + EPSILON)


def layca(p: Array, step: Array, lr: float) -> Array:
    """Project, rotate by atan(lr), go back to the norm that the layer has now."""
    unit = p / np.sqrt(np.sum(p * p))
    step = step - np.sum(step * unit) * unit
    step = step / np.sqrt(np.sum(step * step))
    turned = unit - lr * step
    return np.sqrt(np.sum(p * p)) * turned / np.sqrt(np.sum(turned * turned))


@dataclass(frozen=True)
class Pair:
    """A Keras optimizer and the options of FusedLayca that follow it."""

    keras: Callable[[Array, Slots, float], Array]
    options: Mapping[str, Any]
    lr: float
    tolerance: float = 5e-6


FAST, SLOW = 3.0**-3, 3.0**-5
PAIRS = {
    "sgd": Pair(sgd, {"base": "sgd"}, FAST),
    "momentum": Pair(partial(sgd, momentum=0.9), {"base": "sgd", "momentum": 0.9}, SLOW),
    "nesterov": Pair(
        partial(sgd, momentum=0.9, nesterov=True), {"base": "sgd", "momentum": 0.9, "nesterov": True}, SLOW
    ),
    "amom": Pair(sgd_amom, {"base": "sgd_amom", "momentum": 0.9}, SLOW),
    "rmsprop": Pair(rmsprop, {"base": "rmsprop", "alpha": 0.9, "eps": EPSILON}, FAST),
    "adagrad": Pair(adagrad, {"base": "adagrad", "eps": EPSILON}, FAST),
    "adam": Pair(adam, {"base": "adam", "eps": EPSILON}, SLOW),
    "amsgrad": Pair(partial(adam, amsgrad=True), {"base": "adam", "eps": EPSILON, "amsgrad": True}, SLOW, 3e-5),
}


@pytest.mark.parametrize("name", PAIRS)
@every_backend
def test_a_dozen_steps_follow_keras(backend: str, name: str, seed: int) -> None:
    pair, generator = PAIRS[name], np.random.default_rng(seed)
    shapes = ((12, 20), (5, 4, 3, 3))
    weights = [generator.normal(size=shape) for shape in shapes]
    params = [Parameter(torch.tensor(w, dtype=torch.float32, device=device_of(backend))) for w in weights]
    weights = [param.detach().cpu().double().numpy() for param in params]
    optimizer = FusedLayca(params, pair.lr, radius="current", backend=backend, **pair.options)
    slots: list[Slots] = [{} for _ in shapes]
    for _ in range(12):
        for param in params:
            noise = generator.normal(size=param.shape)
            # Away from zero, where the two kinds of eps would tell.
            grad = torch.tensor(noise + 0.05 * np.sign(noise), dtype=torch.float32)
            param.grad = grad.to(param.device)
        optimizer.step()
        grads = [param.grad.cpu().double().numpy() for param in params]
        weights = [
            layca(w, pair.keras(g, each, pair.lr), pair.lr) for w, g, each in zip(weights, grads, slots, strict=True)
        ]
    for param, expected in zip(params, weights, strict=True):
        error = np.abs(param.detach().cpu().double().numpy() - expected).max() / np.abs(expected).max()
        assert error <= pair.tolerance
