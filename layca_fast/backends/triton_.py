"""The Triton backend: three or four launches a step, however many tensors, on NVIDIA and AMD GPUs.

Where TRITON_INTERPRET=1 was set before Triton was first imported, the same kernels run on CPU tensors instead: slowly,
for tests. Triton itself is imported only where something asks for this backend.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..step.backend import Backend
from ..step.batch import Batch

#: The first version of Triton whose compiler takes tuples.
OLDEST = (3, 3)

#: Bytes of the longest load or store that a GPU has.
VECTOR = 16

#: Elements of one program, and its warps: a thread holds two vectors of 16 bytes of every float32 tensor.
TILE, TILE_WARPS = 2048, 8

#: Tensors that prepare counts at a time, one per thread.
PREPARE_BLOCK, PREPARE_WARPS = 128, 4

#: Tiles that finish adds up at a time: layers of up to 2 million elements cost it one round trip to memory.
FINISH_BLOCK, FINISH_WARPS = 1024, 4


#: Whether a*b + c is fused is otherwise the compiler's choice, kernel by kernel, and rotate must make the step that
#: measure made: Lion's, a sign, may hang on the last bit.
OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Launch:
    """A kernel and all that it is launched with: ``programs`` programs of ``warps`` warps over ``tables``."""

    kernel: Any
    programs: int
    tables: tuple[Tensor, ...]
    constants: Mapping[str, Any]
    warps: int

    def __call__(self) -> None:
        """Launch on the current stream of the current device."""
        self.kernel[(self.programs,)](*self.tables, **self.constants, num_warps=self.warps, **OPTIONS)


def _step_constants(batch: Batch) -> dict[str, Any]:
    """What a kernel must know to make the base step of an element."""
    from . import triton_formulas
    from .triton_types import STORED

    formula = batch.formula
    return {
        "STEP": triton_formulas.lower(formula.step),
        "ADMIT": triton_formulas.lower(formula.admit),
        "READS_GRAD": formula.reads_grad,
        "STATES": len(formula.states),
        "OPTIONS": len(batch.options(batch.slots[0])),
        "COUNTS": formula.counts_steps,
        "ELEMENT": STORED[batch.compute_dtype],
        "PARAM": STORED[batch.dtype],
        "GRAD": STORED[batch.grad_dtype],
        "STATE": STORED[batch.state_dtype],
        "COMPENSATED": batch.compensated,
    }


def _over_tiles(kernel: Any, batch: Batch, tables: tuple[Tensor, ...], **constants: Any) -> Launch:
    # A vector of the narrowest array: the length of a tile that takes vectors is a multiple of this.
    lanes = VECTOR // min(batch.dtype.itemsize, batch.grad_dtype.itemsize, batch.state_dtype.itemsize)
    constants |= {**_step_constants(batch), "LANES": lanes, "TILE": batch.tile}
    tables = (batch.tensors, batch.hypers, batch.step_options, batch.tiles, *tables)
    return Launch(kernel, batch.n_tiles, tables, constants, TILE_WARPS)


def prepare_launch(batch: Batch) -> Launch:
    """Count the step of every tensor and write its options."""
    from . import triton_formulas, triton_kernels

    constants = {
        "n_tensors": len(batch.slots),
        "PREPARE": triton_formulas.lower(batch.formula.prepare),
        "OPTIONS": len(batch.options(batch.slots[0])),
        "BLOCK": PREPARE_BLOCK,
    }
    tables = (batch.tensors, batch.hypers, batch.step_options)
    return Launch(triton_kernels.prepare, -(-len(batch.slots) // PREPARE_BLOCK), tables, constants, PREPARE_WARPS)


def measure_launch(batch: Batch) -> Launch:
    """Advance the states and write the dots and non-finite counts of every tile."""
    from . import triton_formulas, triton_kernels

    advance = triton_formulas.lower(batch.formula.advance)
    # One bit for each state.
    squares = sum(is_square << i for i, is_square in enumerate(batch.formula.are_squares))
    tables = (batch.partials, batch.partial_counts)
    return _over_tiles(triton_kernels.measure, batch, tables, ADVANCE=advance, SQUARES=squares)


def finish_launch(batch: Batch, *, sums: bool, coefficients: bool) -> Launch:
    """Add up the tiles of every layer, or turn its dots into coefficients, or both."""
    from . import triton_kernels

    scratch = (batch.partials, batch.partial_counts)
    results = (batch.dots, batch.coefficients, batch.counts)
    tables = (batch.tensors, batch.hypers, batch.step_options, batch.layers, *scratch, *results)
    constants = {"SUM": sums, "COEFFICIENTS": coefficients, "BLOCK": FINISH_BLOCK, **_step_constants(batch)}
    if not coefficients:
        # One kernel, compiled once, adds up for all formulas and types.
        constants |= dict.fromkeys(_step_constants(batch))
    return Launch(triton_kernels.finish, batch.n_layers, tables, constants, FINISH_WARPS)


def rotate_launch(batch: Batch) -> Launch:
    """Apply the coefficients to every tile."""
    from . import triton_kernels

    return _over_tiles(triton_kernels.rotate, batch, (batch.coefficients,))


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
    from . import triton_formulas

    return triton_formulas.INTERPRETED


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
