"""Backward passes that give chosen gradients, and pairs of optimizers of which one steps inside of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layca_fast import FusedLayca

from ..support import clones, parameter, params_of, random_gradients, same_bits


def backward(params: Sequence[Tensor], row: Sequence[Tensor | None]) -> None:
    """A backward pass that gives each parameter its gradient of ``row`` (None: no gradient), bit for bit."""
    products = [(param * grad).sum() for param, grad in zip(params, row, strict=True) if grad is not None]
    torch.stack([product.float() for product in products]).sum().backward()


def train_in_backward(optimizer: FusedLayca, gradients: Sequence[Sequence[Tensor | None]]) -> None:
    """As ``support.train``, but for where the gradients come from."""
    for row in gradients:
        backward(params_of(optimizer), row)
        optimizer.step()


def pair(backend: str = "torch", **options: Any) -> tuple[FusedLayca, FusedLayca, list[list[Tensor]]]:
    """Two optimizers of the same weights, the second of which steps in backward, and gradients for four steps."""
    params = [parameter(4, 3, backend=backend), parameter(5, backend=backend), parameter(3, 2, backend=backend)]
    ordinary, inside = (
        FusedLayca(clones(params), **{"lr": 0.1, "momentum": 0.9, "backend": backend, **options}) for _ in range(2)
    )
    inside.step_in_backward()
    return ordinary, inside, random_gradients(params, 4)


def assert_same(inside: FusedLayca, ordinary: FusedLayca) -> None:
    """Same weights and state_dict, bit for bit, and no gradient left."""
    assert all(param.grad is None for param in params_of(inside))
    assert same_bits([p.detach() for p in params_of(inside)], [p.detach() for p in params_of(ordinary)])
    assert same_bits(inside.state_dict(), ordinary.state_dict())
