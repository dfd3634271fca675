"""The CUDA backend: not in this version. The module exists so that ``backends()`` can say so."""

import torch

from ..batch import Batch
from .base import Backend


class CudaBackend(Backend):
    """Says why it is missing, and nothing else."""

    name = "cuda"
    tile = 4096

    def missing(self) -> str | None:
        return "this version has no CUDA C++ kernels yet; Triton serves NVIDIA GPUs"

    def refuses(self, device: torch.device) -> str | None:
        return self.missing()

    def measure(self, batch: Batch) -> None:
        raise RuntimeError(self.missing())

    coefficients = rotate = measure


BACKEND = CudaBackend()
