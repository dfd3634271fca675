"""The Triton kernels over a batch's tables: measure and rotate with one program per tile, finish with one per layer.

They run compiled on NVIDIA and AMD GPUs, and interpreted on CPU tensors where TRITON_INTERPRET=1 was in the
environment when this module was imported. They contain no formula: a batch's own come in as compile-time arguments.
``tile.py`` has what is done within a tile.
"""

# Triton's values have no static types, and its compiler knows no starred tuples.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

import triton
import triton.language as tl

from ...formulas import rotation
from .columns import (
    _A,
    _B,
    _BROKEN,
    _C,
    _COEFFICIENT_WIDTH,
    _COUNT_WIDTH,
    _CURRENT,
    _FIRST_LAYER,
    _FIRST_TILE,
    _FLAGS,
    _GRAD,
    _HYPER,
    _HYPER_WIDTH,
    _KEEP,
    _LAYER_TENSOR,
    _LAYER_WIDTH,
    _LAYERS,
    _LENGTH,
    _LR,
    _MAX_OPTIONS,
    _MODE,
    _NO_DIRECTION,
    _NOISE,
    _NON_FINITE,
    _NUMEL,
    _OFFSET,
    _OPTION,
    _PART,
    _RADIUS,
    _ROTATES,
    _RULE,
    _STEP,
    _TENSOR_WIDTH,
    _TILE_LAYER,
    _TILE_TENSOR,
    _TILE_WIDTH,
    _TILES,
    _WAITS,
    _WEIGHT_DECAY,
)
from .formulas import device_function, lower
from .tile import addresses_of, is_aligned, measure_tile, options_row_of, rotate_tile, step_again
from .types import load_weight

_coefficients = lower(rotation.coefficients)
_orthogonal_square, _is_nearly_parallel = lower(rotation.orthogonal_square), lower(rotation.is_nearly_parallel)


@triton.jit
def prepare(
    tensors, hypers, step_options, n_tensors, PREPARE: tl.constexpr, OPTIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Count this step (in place) and write its options, for every tensor that has a gradient."""
    tensor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tensors + tensor * _TENSOR_WIDTH
    has_grad = tl.load(row + _GRAD, mask=tensor < n_tensors, other=0) != 0
    counter = tl.load(row + _STEP, mask=has_grad, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(counter, mask=has_grad, other=0.0) + 1.0
    tl.store(counter, count, mask=has_grad)
    hyper = hypers + tl.load(row + _HYPER, mask=has_grad, other=0) * _HYPER_WIDTH
    options = ()
    for i in tl.static_range(OPTIONS):
        options = options + (tl.load(hyper + _OPTION + i, mask=has_grad, other=0.0),)
    prepared = PREPARE(count.to(tl.float64), options)
    for i in tl.static_range(OPTIONS):
        tl.store(step_options + tensor * _MAX_OPTIONS + i, prepared[i], mask=has_grad)


@triton.jit
def measure(
    tensors, hypers, step_options, tiles, partials, partial_counts,
    ADVANCE: tl.constexpr, STEP: tl.constexpr, ADMIT: tl.constexpr, SQUARES: tl.constexpr,
    READS_GRAD: tl.constexpr, STATES: tl.constexpr, OPTIONS: tl.constexpr, COUNTS: tl.constexpr,
    ELEMENT: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    COMPENSATED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Advance the states of one tile (in place) and write its three dots and its number of non-finite elements."""
    index = tl.program_id(0).to(tl.int64)
    tile = tiles + index * _TILE_WIDTH
    tensor = tl.load(tile + _TILE_TENSOR)
    row = tensors + tensor * _TENSOR_WIDTH
    if tl.load(row + _GRAD) != 0:
        length = tl.load(tile + _LENGTH)
        addresses = addresses_of(row, tl.load(tile + _OFFSET), PARAM, GRAD, STATE, STATES)
        hyper = hypers + tl.load(row + _HYPER) * _HYPER_WIDTH
        options_row = options_row_of(hyper, step_options, tensor, COUNTS)
        aligned = is_aligned(addresses, length, True, STATES, COMPENSATED, LANES)
        for ALIGNED in tl.static_range(2):
            if aligned == ALIGNED:
                measure_tile(
                    addresses, length, hyper, options_row, partials, partial_counts,
                    ADVANCE, STEP, ADMIT, SQUARES, READS_GRAD, STATES, OPTIONS,
                    ELEMENT, PARAM, GRAD, STATE, COMPENSATED, LANES, TILE, ALIGNED,
                )  # fmt: skip


@device_function
def _sum_tiles(partials, partial_counts, first, tiles, BLOCK: tl.constexpr):
    # Each lane adds up its own tiles, then the lanes are added up: an order that the number of tiles alone decides.
    lanes = tl.arange(0, BLOCK)
    n2 = tl.full((BLOCK,), 0.0, tl.float64)
    d = tl.full((BLOCK,), 0.0, tl.float64)
    q = tl.full((BLOCK,), 0.0, tl.float64)
    non_finite = tl.full((BLOCK,), 0, tl.int64)
    for done in range(0, tiles, BLOCK):
        inside = lanes < tiles - done
        tile = first + done + lanes
        n2 += tl.load(partials + tile * 3, mask=inside, other=0.0)
        d += tl.load(partials + tile * 3 + 1, mask=inside, other=0.0)
        q += tl.load(partials + tile * 3 + 2, mask=inside, other=0.0)
        non_finite += tl.load(partial_counts + tile, mask=inside, other=0)
    return tl.sum(n2, axis=0), tl.sum(d, axis=0), tl.sum(q, axis=0), tl.sum(non_finite, axis=0)


@device_function
def _add(count, increment):
    tl.store(count, tl.load(count) + increment.to(tl.int64))


@device_function
def _measure_orthogonal_square(
    n2, d, layer, row, hyper, options_row,
    STEP: tl.constexpr, ADMIT: tl.constexpr, READS_GRAD: tl.constexpr, STATES: tl.constexpr, OPTIONS: tl.constexpr,
    ELEMENT: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, COMPENSATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # One program walks the whole layer: slow for a large one, but next to no step is so nearly parallel.
    length = tl.load(row + _NUMEL) // tl.load(row + _LAYERS)
    first = (layer - tl.load(row + _FIRST_LAYER)) * length
    c = d / n2
    lanes = tl.arange(0, BLOCK)
    sums = tl.full((BLOCK,), 0.0, tl.float64)
    for start in range(0, length, BLOCK):
        addresses = addresses_of(row, first + start, PARAM, GRAD, STATE, STATES)
        inside = lanes < length - start
        u = step_again(
            addresses, hyper, options_row, lanes, inside,
            STEP, ADMIT, READS_GRAD, STATES, OPTIONS, ELEMENT, GRAD, STATE, False,
        )  # fmt: skip
        w = load_weight(addresses, lanes, inside, PARAM, ELEMENT, COMPENSATED, False, "").to(tl.float64)
        difference = tl.where(inside, u.to(tl.float64) - c * w, 0.0)
        sums += difference * difference
    return tl.sum(sums, axis=0)


@device_function
def _write_coefficients(n2, d, q, sigma2, layer, row, hyper, has_grad, coefficients, count):
    lr = tl.load(hyper + _LR)
    flags = tl.load(row + _FLAGS)
    rotates, current, waits = (flags & _ROTATES) != 0, (flags & _CURRENT) != 0, (flags & _WAITS) != 0
    radii = tl.load(row + _RADIUS).to(tl.pointer_type(tl.float64)) + (layer - tl.load(row + _FIRST_LAYER))
    old_radius = tl.load(radii, mask=rotates, other=0.0)
    decay = tl.load(hyper + _WEIGHT_DECAY)
    rule, noise = tl.load(row + _RULE), tl.load(hyper + _NOISE)
    a, b, c, mode, radius = _coefficients(n2, d, q, sigma2, lr, old_radius, decay, rotates, current, waits, rule, noise)
    mode = tl.where(has_grad, mode, _KEEP)
    tl.store(coefficients + _A, a)
    tl.store(coefficients + _B, b)
    tl.store(coefficients + _C, c)
    tl.store(coefficients + _MODE, mode)
    rotates = rotates & has_grad
    tl.store(radii, radius, mask=rotates)
    finite = tl.abs(n2) < float("inf")
    _add(count + _NO_DIRECTION, rotates & finite & (lr > 0.0) & (mode == _KEEP))
    _add(count + _BROKEN, rotates & (finite == 0))


@triton.jit
def finish(
    tensors, hypers, step_options, layers, partials, partial_counts, dots, coefficients, counts,
    SUM: tl.constexpr, COEFFICIENTS: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr, ADMIT: tl.constexpr, READS_GRAD: tl.constexpr, STATES: tl.constexpr, OPTIONS: tl.constexpr,
    COUNTS: tl.constexpr, ELEMENT: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    COMPENSATED: tl.constexpr,
):  # fmt: skip
    """SUM: add up the dots and counts of one layer's tiles. COEFFICIENTS: turn its dots into coefficients."""
    layer = tl.program_id(0).to(tl.int64)
    entry = layers + layer * _LAYER_WIDTH
    tensor = tl.load(entry + _LAYER_TENSOR)
    row = tensors + tensor * _TENSOR_WIDTH
    has_grad = tl.load(row + _GRAD) != 0
    dot, count = dots + layer * 3, counts + layer * _COUNT_WIDTH
    if SUM:
        # Without a gradient measure left the tiles alone: what stands there is of an earlier step.
        tiles = tl.where(has_grad, tl.load(entry + _TILES), 0)
        n2, d, q, non_finite = _sum_tiles(partials, partial_counts, tl.load(entry + _FIRST_TILE), tiles, BLOCK)
        tl.store(dot, n2)
        tl.store(dot + 1, d)
        tl.store(dot + 2, q)
        _add(count + _NON_FINITE, non_finite)
    else:
        n2, d, q = tl.load(dot), tl.load(dot + 1), tl.load(dot + 2)
    if COEFFICIENTS:
        hyper = hypers + tl.load(row + _HYPER) * _HYPER_WIDTH
        sigma2 = _orthogonal_square(n2, d, q)
        here = (tl.load(row + _FLAGS) & (_ROTATES | _PART)) == _ROTATES
        if has_grad & here & _is_nearly_parallel(sigma2, q):
            options_row = options_row_of(hyper, step_options, tensor, COUNTS)
            sigma2 = _measure_orthogonal_square(
                n2, d, layer, row, hyper, options_row,
                STEP, ADMIT, READS_GRAD, STATES, OPTIONS, ELEMENT, PARAM, GRAD, STATE, COMPENSATED, BLOCK,
            )  # fmt: skip
        coefficients = coefficients + layer * _COEFFICIENT_WIDTH
        _write_coefficients(n2, d, q, sigma2, layer, row, hyper, has_grad, coefficients, count)


@triton.jit
def rotate(
    tensors, hypers, step_options, tiles, coefficients,
    STEP: tl.constexpr, ADMIT: tl.constexpr, READS_GRAD: tl.constexpr, STATES: tl.constexpr, OPTIONS: tl.constexpr,
    COUNTS: tl.constexpr, ELEMENT: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    COMPENSATED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Apply the coefficients to one tile of the parameters (in place), the base step made anew from the state."""
    # Backwards: what measure touched last is still in the cache.
    tile = tiles + (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * _TILE_WIDTH
    coefficients = coefficients + tl.load(tile + _TILE_LAYER) * _COEFFICIENT_WIDTH
    # KEEP is also the mode of every layer without a gradient.
    if tl.load(coefficients + _MODE) != _KEEP:
        tensor = tl.load(tile + _TILE_TENSOR)
        row = tensors + tensor * _TENSOR_WIDTH
        length = tl.load(tile + _LENGTH)
        addresses = addresses_of(row, tl.load(tile + _OFFSET), PARAM, GRAD, STATE, STATES)
        hyper = hypers + tl.load(row + _HYPER) * _HYPER_WIDTH
        options_row = options_row_of(hyper, step_options, tensor, COUNTS)
        aligned = is_aligned(addresses, length, READS_GRAD, STATES, COMPENSATED, LANES)
        for ALIGNED in tl.static_range(2):
            if aligned == ALIGNED:
                rotate_tile(
                    addresses, length, hyper, options_row, coefficients,
                    STEP, ADMIT, READS_GRAD, STATES, OPTIONS,
                    ELEMENT, PARAM, GRAD, STATE, COMPENSATED, LANES, TILE, ALIGNED,
                )  # fmt: skip
