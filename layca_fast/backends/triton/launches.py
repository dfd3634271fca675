"""The launches of a step, of each kernel with the tables and constants that it takes from a batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...step.batch import Batch

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
    from . import formulas
    from .types import STORED

    return {
        "STEP": formulas.lower(batch.formula.step),
        "ADMIT": formulas.lower(batch.formula.admit),
        "READS_GRAD": batch.formula.reads_grad,
        "STATES": len(batch.formula.states),
        "OPTIONS": len(batch.options(batch.slots[0])),
        "COUNTS": batch.formula.counts_steps,
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
    from . import formulas, kernels

    constants = {
        "n_tensors": len(batch.slots),
        "PREPARE": formulas.lower(batch.formula.prepare),
        "OPTIONS": len(batch.options(batch.slots[0])),
        "BLOCK": PREPARE_BLOCK,
    }
    tables = (batch.tensors, batch.hypers, batch.step_options)
    return Launch(kernels.prepare, -(-len(batch.slots) // PREPARE_BLOCK), tables, constants, PREPARE_WARPS)


def measure_launch(batch: Batch) -> Launch:
    """Advance the states and write the dots and non-finite counts of every tile."""
    from . import formulas, kernels

    advance = formulas.lower(batch.formula.advance)
    # One bit for each state.
    squares = sum(is_square << i for i, is_square in enumerate(batch.formula.are_squares))
    tables = (batch.partials, batch.partial_counts)
    return _over_tiles(kernels.measure, batch, tables, ADVANCE=advance, SQUARES=squares)


def finish_launch(batch: Batch, *, sums: bool, coefficients: bool) -> Launch:
    """Add up the tiles of every layer, or turn its dots into coefficients, or both."""
    from . import kernels

    scratch = (batch.partials, batch.partial_counts)
    results = (batch.dots, batch.coefficients, batch.counts)
    tables = (batch.tensors, batch.hypers, batch.step_options, batch.layers, *scratch, *results)
    constants = {"SUM": sums, "COEFFICIENTS": coefficients, "BLOCK": FINISH_BLOCK, **_step_constants(batch)}
    if not coefficients:
        # One kernel, compiled once, adds up for all formulas and types.
        constants |= dict.fromkeys(_step_constants(batch))
    return Launch(kernels.finish, batch.n_layers, tables, constants, FINISH_WARPS)


def rotate_launch(batch: Batch) -> Launch:
    """Apply the coefficients to every tile."""
    from . import kernels

    return _over_tiles(kernels.rotate, batch, (batch.coefficients,))
