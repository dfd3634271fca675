"""What the tests that need a GPU share."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca

from .support import params_of

#: Marks of every test that needs a GPU.
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU (torch.cuda.is_available())"),
]

#: The compiled backends of a GPU's maker. A missing one fails its tests with the reason, and hides nothing.
GPU_BACKENDS = ("cuda", "triton") if torch.version.hip is None else ("triton",)
every_gpu_backend = pytest.mark.parametrize("backend", GPU_BACKENDS)

GPU = torch.device("cuda", 0)

SHAPES = ((64, 129), (33,), (8, 3, 3, 3), (100, 100), (7, 5), (1, 1), (), (130, 65))


def weights(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random tensors on the CPU."""
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def on(device: torch.device, tensors: Sequence[Tensor]) -> list[Parameter]:
    """Parameters on ``device`` with copies of the values."""
    return [Parameter(tensor.to(device, copy=True)) for tensor in tensors]


def give(optimizer: FusedLayca, grads: Sequence[Tensor | None]) -> None:
    """Copies of these gradients where the parameters are."""
    for param, grad in zip(params_of(optimizer), grads, strict=True):
        param.grad = None if grad is None else grad.to(param.device, param.dtype, copy=True)


def ready(backend: str, shapes: Sequence[tuple[int, ...]] = SHAPES, **options: Any) -> FusedLayca:
    """An optimizer on the GPU two steps into its run, with gradients for the next."""
    optimizer = FusedLayca(on(GPU, weights(shapes)), **{"lr": 0.03, "backend": backend, **options})
    for _ in range(2):
        give(optimizer, weights(shapes))
        optimizer.step()
    give(optimizer, weights(shapes))
    return optimizer
