"""The CUDA backend: C++ kernels, three or four launches a step however many tensors, on NVIDIA GPUs."""

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from ..step.backend import Backend
from ..step.batch import Batch
from .native import Views

if TYPE_CHECKING:
    from .._cuda import BatchView

#: The oldest GPU that the module is compiled for: csrc/cuda.cmake.
OLDEST = (8, 0)


@cache
def _too_old(device: torch.device) -> str | None:
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST:
        return None
    return f"its compute capability is {found[0]}.{found[1]}, and the kernels need {OLDEST[0]}.{OLDEST[1]} or newer"


class CudaBackend(Backend):
    """Measure and rotate with a block of threads per tile, finish with one per layer.

    Everything is queued on the current stream of the tensors' device, whichever device is current. Nothing waits for
    the GPU, and nothing is allocated after the first step.
    """

    name = "cuda"
    tile = 4096

    def __init__(self) -> None:
        self._views: Views[BatchView] = Views("cuda")

    def missing(self) -> str | None:
        if self._views.native is None:
            return self._views.reason
        if torch.version.hip is not None:
            return "no device: this torch was built for AMD GPUs, which Triton serves"
        if not torch.cuda.is_available():
            return "no device: torch finds no GPU"
        problem: str = self._views.native.device_problem()
        if "driver version is insufficient" in problem:
            problem += " (the module was built with a newer CUDA than the driver knows: update the driver, or build it "
            problem += "with an older CUDA)"
        return f"no device: {problem}" if problem else None

    def refuses(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "it takes tensors on an NVIDIA GPU only"
        return _too_old(device)

    def _view(self, batch: Batch) -> "BatchView":
        view = self._views.known(batch)
        if view is None:
            view = self._views.of(batch, tiles=batch.tiles.data_ptr(), n_tiles=batch.n_tiles)
        return view

    def measure(self, batch: Batch) -> None:
        with torch.cuda.device(batch.device):
            self._view(batch).measure(torch.cuda.current_stream().cuda_stream)

    def coefficients(self, batch: Batch) -> None:
        with torch.cuda.device(batch.device):
            self._view(batch).coefficients(torch.cuda.current_stream().cuda_stream)

    def rotate(self, batch: Batch) -> None:
        with torch.cuda.device(batch.device):
            self._view(batch).rotate(torch.cuda.current_stream().cuda_stream)

    def reserve(self, batch: Batch) -> None:
        self._view(batch)

    def is_uninterrupted(self, batch: Batch) -> bool:
        # Launches go to the current device: to make another the current one takes Python code. Stand-ins have no index.
        return batch.device.type != "cuda" or batch.device.index == torch.cuda.current_device()

    def call(self, batch: Batch) -> Callable[[], object]:
        if not self.is_uninterrupted(batch):
            return partial(self.step, batch)
        return partial(self._view(batch).step, torch.cuda.current_stream().cuda_stream)

    def step(self, batch: Batch) -> None:
        with torch.cuda.device(batch.device):
            self._view(batch).step(torch.cuda.current_stream().cuda_stream)


BACKEND = CudaBackend()
