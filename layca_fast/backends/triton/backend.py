"""Three or four launches a step, however many tensors, on NVIDIA and AMD GPUs.

Where TRITON_INTERPRET=1 was set before Triton was first imported, the same kernels run on CPU tensors instead: slowly,
for tests.
"""

from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from ...step.backend import Backend
from ...step.batch import Batch
from .launches import TILE, finish_launch, measure_launch, prepare_launch, rotate_launch

#: The first version of Triton whose compiler takes tuples.
OLDEST = (3, 3)


def _advance(batch: Batch) -> None:
    if batch.formula.counts_steps:
        prepare_launch(batch)()
    measure_launch(batch)()


def _launching(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cuda":
        return torch.cuda.device(device)
    import numpy

    # The interpreter computes with numpy, which warns of the infinities and NaNs that the formulas allow for.
    return numpy.errstate(all="ignore")


@cache
def _interpreted() -> bool:
    from . import formulas

    return formulas.INTERPRETED


@cache
def _missing() -> str | None:
    if find_spec("triton") is None:
        return 'Triton is not installed: pip install "layca_fast[triton]"'
    try:
        import triton

        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if version < OLDEST:
            return f"Triton {triton.__version__} is too old: it takes {'.'.join(map(str, OLDEST))} or newer"
        if _interpreted():
            return None
        if not torch.cuda.is_available():
            return "no GPU was found; TRITON_INTERPRET=1, set before Triton is imported, runs it on CPU tensors"
        # Triton builds its link to the GPU's driver here, with the system's C compiler.
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton does not work here: {type(error).__name__}: {error}"
    return None


class TritonBackend(Backend):
    """Triton kernels, compiled when they are first launched; Triton keeps what it compiled on disk."""

    name = "triton"
    tile = TILE

    def missing(self) -> str | None:
        return _missing()

    def refuses(self, device: torch.device) -> str | None:
        if _interpreted():
            return None if device.type == "cpu" else "under TRITON_INTERPRET=1 it takes tensors on the CPU only"
        return None if device.type == "cuda" else "it takes tensors on a GPU, or on the CPU under TRITON_INTERPRET=1"

    def measure(self, batch: Batch) -> None:
        with _launching(batch.device):
            _advance(batch)
            finish_launch(batch, sums=True, coefficients=False)()

    def coefficients(self, batch: Batch) -> None:
        with _launching(batch.device):
            finish_launch(batch, sums=False, coefficients=True)()

    def rotate(self, batch: Batch) -> None:
        with _launching(batch.device):
            rotate_launch(batch)()

    def step(self, batch: Batch) -> None:
        """All three verbs at once: one kernel finishes the sums and makes the coefficients of them."""
        with _launching(batch.device):
            _advance(batch)
            finish_launch(batch, sums=True, coefficients=True)()
            rotate_launch(batch)()


BACKEND = TritonBackend()
