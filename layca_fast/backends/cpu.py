"""The native CPU backend: C++ kernels that keep a layer in cache between measure and rotate."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..step.backend import Backend
from ..step.batch import Batch
from .native import Views

if TYPE_CHECKING:
    from .._cpu import BatchView


class CpuBackend(Backend):
    """Layers that fit in a core's cache are done whole by one thread; larger ones are shared by all threads.

    Runs on ``torch.get_num_threads()`` threads, which are those that torch itself uses where both were compiled with
    GNU OpenMP. Denormal numbers count as zero for the duration of a call.
    """

    name = "cpu"
    is_native = True
    tile = 4096
    #: Of those in ``_cpu.instruction_sets``; None: the best. Batches that were stepped before keep to theirs.
    instructions: str | None = None

    def __init__(self) -> None:
        self._views: Views[BatchView] = Views("cpu")

    def missing(self) -> str | None:
        return self._views.reason

    def refuses(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it runs on CPU tensors only"

    def _view(self, batch: Batch) -> "BatchView":
        return self._views.of(batch, instructions=self.instructions)

    def measure(self, batch: Batch) -> None:
        self._view(batch).measure(torch.get_num_threads())

    def coefficients(self, batch: Batch) -> None:
        self._view(batch).coefficients()

    def rotate(self, batch: Batch) -> None:
        self._view(batch).rotate(torch.get_num_threads())

    def step(self, batch: Batch) -> None:
        self._view(batch).step(torch.get_num_threads())

    def reserve(self, batch: Batch) -> None:
        self._view(batch).reserve(torch.get_num_threads())

    def call(self, batch: Batch) -> Callable[[], object]:
        return partial(self._view(batch).step, torch.get_num_threads())


BACKEND = CpuBackend()
