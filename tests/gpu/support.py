"""What the tests that need a GPU share."""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import Parameter

from layca_fast import FusedLayca

from ..support import params_of, shapes_for

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
    """An optimizer on the GPU two steps into its run, with gradients for the next; of matrices where its base asks."""
    shapes = shapes_for(options, shapes)
    optimizer = FusedLayca(on(GPU, weights(shapes)), **{"lr": 0.03, "backend": backend, **options})
    for _ in range(2):
        give(optimizer, weights(shapes))
        optimizer.step()
    give(optimizer, weights(shapes))
    return optimizer


def _set_sync_debug_mode(mode: str) -> None:
    with warnings.catch_warnings():
        # torch says so once a process, after it has set the mode.
        warnings.filterwarnings("ignore", message=".*prototype feature")
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """What makes the host wait for the GPU raises, as far as torch notices it."""
    try:
        _set_sync_debug_mode("error")
        yield
    finally:
        _set_sync_debug_mode("default")


#: Our kernels, by a part of what the profiler calls them: C++'s names with namespaces and template arguments, Triton's
#: with what it specialized them for.
_KERNEL = re.compile(r"(?<![A-Za-z_])(prepare|measure|finish|rotate)(?![A-Za-z]*[a-z])")


def kernels_and_others(events: Iterable[Any]) -> tuple[list[str], list[str]]:
    """What the profiler saw on the GPU: the names of our kernels, sorted, and all else but copies of tables to it."""
    kernels, others = [], []
    for event in events:
        # The profiler marks the time of a step, which torch gives a name, on the GPU as well.
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        found = _KERNEL.search(event.name)
        if found:
            kernels.append(found[1])
        elif not event.name.startswith("Memcpy HtoD"):
            others.append(event.name)
    return sorted(kernels), others
