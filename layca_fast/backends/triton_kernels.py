"""The Triton kernels over a batch's tables: measure and rotate with one program per tile, finish with one per layer.

They run compiled on NVIDIA and AMD GPUs, and interpreted on CPU tensors where TRITON_INTERPRET=1 was in the
environment when this module was imported. They contain no formula: a batch's own come in as compile-time arguments.

Addresses come out of the tensor table as integers, so Triton knows nothing about their alignment. Tiles whose
addresses and length are multiples of 16 bytes take a copy of the code that is told so, in which loads and stores are
128 bits wide; all others take a copy that is not. Both mask by the tile's length: that costs no width once the compiler
knows that no vector straddles the end.
"""

# Triton's values have no static types, and its compiler knows no starred tuples.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

from enum import IntEnum
from typing import Any

import triton
import triton.language as tl

from ..formulas import rotation
from ..formulas.tables import MAX_OPTIONS, Coefficient, Column, Count, Flag, Hyper, Layer, Tile
from .triton_formulas import constant, device_function, finite_or_zero, lower
from .triton_types import VECTOR, decode, encode, load, load_weight, pointers, store_weight


def _constants(*members: IntEnum) -> tuple[Any, ...]:
    return tuple(constant(int(member)) for member in members)


_TENSOR_WIDTH, _PARAM, _GRAD, _STATE = _constants(Column.WIDTH, Column.PARAM, Column.GRAD, Column.STATE)
_RADIUS, _FIRST_LAYER, _HYPER, _FLAGS = _constants(Column.RADIUS, Column.FIRST_LAYER, Column.HYPER, Column.FLAGS)
_NUMEL, _LAYERS, _STEP, _RULE = _constants(Column.NUMEL, Column.LAYERS, Column.STEP, Column.RULE)
(_REMAINDER,) = _constants(Column.REMAINDER)
_ROTATES, _CURRENT, _PART = _constants(Flag.ROTATES, Flag.CURRENT, Flag.PART)
_HYPER_WIDTH, _LR, _WEIGHT_DECAY = _constants(Hyper.WIDTH, Hyper.LR, Hyper.WEIGHT_DECAY)
_GRAD_SCALE, _NOISE, _OPTION = _constants(Hyper.GRAD_SCALE, Hyper.NOISE, Hyper.OPTION)
_LAYER_WIDTH, _LAYER_TENSOR, _FIRST_TILE, _TILES = _constants(Layer.WIDTH, Layer.TENSOR, Layer.FIRST_TILE, Layer.TILES)
_TILE_WIDTH, _TILE_TENSOR, _TILE_LAYER = _constants(Tile.WIDTH, Tile.TENSOR, Tile.LAYER)
_OFFSET, _LENGTH = _constants(Tile.OFFSET, Tile.LENGTH)
_COUNT_WIDTH, _NON_FINITE, _NO_DIRECTION, _BROKEN = _constants(
    Count.WIDTH, Count.NON_FINITE, Count.NO_DIRECTION, Count.BROKEN
)
_COEFFICIENT_WIDTH, _A, _B, _C, _MODE = _constants(
    Coefficient.WIDTH, Coefficient.A, Coefficient.B, Coefficient.C, Coefficient.MODE
)
_KEEP, _PRECISE = constant(rotation.KEEP), constant(rotation.PRECISE)
_MAX_OPTIONS = constant(MAX_OPTIONS)

_coefficients = lower(rotation.coefficients)
_orthogonal_square, _is_nearly_parallel = lower(rotation.orthogonal_square), lower(rotation.is_nearly_parallel)


@device_function
def _address(row, column, start, STORED: tl.constexpr):
    return tl.load(row + column) + start * (STORED.primitive_bitwidth // 8)


@device_function
def _addresses(row, start, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, STATES: tl.constexpr):
    # (parameter, remainder, gradient, state ...) of the tensor's element ``start``; the remainder may not be there.
    addresses = (_address(row, _PARAM, start, PARAM), _address(row, _REMAINDER, start, tl.int16))
    addresses = addresses + (_address(row, _GRAD, start, GRAD),)
    for i in tl.static_range(STATES):
        addresses = addresses + (_address(row, _STATE + i, start, STATE),)
    return addresses


@device_function
def _is_aligned(
    addresses, length, READS_GRAD: tl.constexpr, STATES: tl.constexpr, COMPENSATED: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    bits = addresses[0]
    if COMPENSATED:
        bits = bits | addresses[1]
    if READS_GRAD:
        bits = bits | addresses[2]
    for i in tl.static_range(STATES):
        bits = bits | addresses[3 + i]
    return ((bits % VECTOR == 0) & (length % LANES == 0)).to(tl.int32)


@device_function
def _options_row(hyper, step_options, tensor, COUNTS: tl.constexpr):
    # Only where the formula counts its steps do the options of a tensor differ from those of its group.
    return step_options + tensor * _MAX_OPTIONS if COUNTS else hyper + _OPTION


@device_function
def _options(row, OPTIONS: tl.constexpr, ELEMENT: tl.constexpr):
    # In the element type: as float64 they would draw all of a float32 formula into float64.
    options = ()
    for i in tl.static_range(OPTIONS):
        options = options + (tl.load(row + i).to(ELEMENT),)
    return options


@device_function
def _inside(lanes, length, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    if ALIGNED:
        # Changes no value: it shows the compiler that the length is a multiple of a vector's.
        length = length // LANES * LANES
    return lanes < length


@device_function
def _load_gradient(
    address, hyper, lanes, inside,
    ADMIT: tl.constexpr, GRAD: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    raw = tl.load(hyper + _GRAD_SCALE).to(ELEMENT) * load(address, lanes, inside, GRAD, ELEMENT, ALIGNED, POLICY)
    grad = ADMIT(raw)
    return grad, grad != raw


@device_function
def _measure_tile(
    addresses, length, hyper, options_row, partials, partial_counts,
    ADVANCE: tl.constexpr, STEP: tl.constexpr, ADMIT: tl.constexpr, SQUARES: tl.constexpr,
    READS_GRAD: tl.constexpr, STATES: tl.constexpr, OPTIONS: tl.constexpr,
    ELEMENT: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    COMPENSATED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, TILE)
    inside = _inside(lanes, length, LANES, ALIGNED)
    options = _options(options_row, OPTIONS, ELEMENT)
    # Only what rotate reads again deserves its place in the cache.
    POLICY: tl.constexpr = "" if READS_GRAD else "evict_first"
    grad, non_finite = _load_gradient(addresses[2], hyper, lanes, inside, ADMIT, GRAD, ELEMENT, ALIGNED, POLICY)
    before = ()
    for i in tl.static_range(STATES):
        before = before + (load(addresses[3 + i], lanes, inside, STATE, ELEMENT, ALIGNED, ""),)
    w = load_weight(addresses, lanes, inside, PARAM, ELEMENT, COMPENSATED, ALIGNED, "").to(tl.float64)
    advanced = ADVANCE(grad, before, options)
    are_good = inside | True
    rounded = ()
    for i in tl.static_range(STATES):
        # As it will be stored: rotate makes its step of nothing else.
        rounded = rounded + (decode(encode(advanced[i], STATE), STATE, ELEMENT),)
        are_good = are_good & (tl.abs(rounded[i]) < float("inf"))
    # The states of an element go together: where one is not finite they start anew, with the square of this gradient.
    state = ()
    for i in tl.static_range(STATES):
        anew = finite_or_zero(decode(encode(grad * grad, STATE), STATE, ELEMENT)) if (SQUARES >> i) % 2 else grad * 0.0
        clean = tl.where(are_good, rounded[i], anew)
        tl.store(pointers(addresses[3 + i], lanes, STATE, ALIGNED), encode(clean, STATE), mask=inside)
        state = state + (clean,)
    non_finite = non_finite | (are_good == 0)
    step = STEP(grad, state, options)
    u = finite_or_zero(step)
    non_finite = (non_finite | (u != step)) & inside
    # Beyond the end a formula may make anything of its zeros.
    u = tl.where(inside, u, 0.0).to(tl.float64)
    index = tl.program_id(0).to(tl.int64)
    tl.store(partials + index * 3, tl.sum(w * w, axis=0))
    tl.store(partials + index * 3 + 1, tl.sum(w * u, axis=0))
    tl.store(partials + index * 3 + 2, tl.sum(u * u, axis=0))
    tl.store(partial_counts + index, tl.sum(non_finite.to(tl.int32), axis=0))


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
        addresses = _addresses(row, tl.load(tile + _OFFSET), PARAM, GRAD, STATE, STATES)
        hyper = hypers + tl.load(row + _HYPER) * _HYPER_WIDTH
        options_row = _options_row(hyper, step_options, tensor, COUNTS)
        aligned = _is_aligned(addresses, length, True, STATES, COMPENSATED, LANES)
        for ALIGNED in tl.static_range(2):
            if aligned == ALIGNED:
                _measure_tile(
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
def _step_again(
    addresses, hyper, options_row, lanes, inside,
    STEP: tl.constexpr, ADMIT: tl.constexpr, READS_GRAD: tl.constexpr, STATES: tl.constexpr, OPTIONS: tl.constexpr,
    ELEMENT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    if READS_GRAD:
        grad, _ = _load_gradient(addresses[2], hyper, lanes, inside, ADMIT, GRAD, ELEMENT, ALIGNED, "evict_first")
    else:
        grad = 0.0
    state = ()
    for i in tl.static_range(STATES):
        state = state + (load(addresses[3 + i], lanes, inside, STATE, ELEMENT, ALIGNED, "evict_first"),)
    return finite_or_zero(STEP(grad, state, _options(options_row, OPTIONS, ELEMENT)))


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
        addresses = _addresses(row, first + start, PARAM, GRAD, STATE, STATES)
        inside = lanes < length - start
        u = _step_again(
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
    rotates, current = (flags & _ROTATES) != 0, (flags & _CURRENT) != 0
    radii = tl.load(row + _RADIUS).to(tl.pointer_type(tl.float64)) + (layer - tl.load(row + _FIRST_LAYER))
    old_radius = tl.load(radii, mask=rotates, other=0.0)
    decay = tl.load(hyper + _WEIGHT_DECAY)
    rule, noise = tl.load(row + _RULE), tl.load(hyper + _NOISE)
    a, b, c, mode, radius = _coefficients(n2, d, q, sigma2, lr, old_radius, decay, rotates, current, rule, noise)
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
            options_row = _options_row(hyper, step_options, tensor, COUNTS)
            sigma2 = _measure_orthogonal_square(
                n2, d, layer, row, hyper, options_row,
                STEP, ADMIT, READS_GRAD, STATES, OPTIONS, ELEMENT, PARAM, GRAD, STATE, COMPENSATED, BLOCK,
            )  # fmt: skip
        coefficients = coefficients + layer * _COEFFICIENT_WIDTH
        _write_coefficients(n2, d, q, sigma2, layer, row, hyper, has_grad, coefficients, count)


@device_function
def _rotate_tile(
    addresses, length, hyper, options_row, coefficients,
    STEP: tl.constexpr, ADMIT: tl.constexpr, READS_GRAD: tl.constexpr, STATES: tl.constexpr, OPTIONS: tl.constexpr,
    ELEMENT: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    COMPENSATED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, TILE)
    inside = _inside(lanes, length, LANES, ALIGNED)
    w = load_weight(addresses, lanes, inside, PARAM, ELEMENT, COMPENSATED, ALIGNED, "evict_first")
    u = _step_again(
        addresses, hyper, options_row, lanes, inside,
        STEP, ADMIT, READS_GRAD, STATES, OPTIONS, ELEMENT, GRAD, STATE, ALIGNED,
    )  # fmt: skip
    a, b = tl.load(coefficients + _A), tl.load(coefficients + _B)
    if tl.load(coefficients + _MODE) == _PRECISE:
        wide = w.to(tl.float64)
        w = (a * wide + b * (u.to(tl.float64) - tl.load(coefficients + _C) * wide)).to(ELEMENT)
    else:
        w = tl.fma(a.to(ELEMENT), w, b.to(ELEMENT) * u)
    store_weight(addresses, lanes, inside, w, PARAM, COMPENSATED, ALIGNED)


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
        addresses = _addresses(row, tl.load(tile + _OFFSET), PARAM, GRAD, STATE, STATES)
        hyper = hypers + tl.load(row + _HYPER) * _HYPER_WIDTH
        options_row = _options_row(hyper, step_options, tensor, COUNTS)
        aligned = _is_aligned(addresses, length, READS_GRAD, STATES, COMPENSATED, LANES)
        for ALIGNED in tl.static_range(2):
            if aligned == ALIGNED:
                _rotate_tile(
                    addresses, length, hyper, options_row, coefficients,
                    STEP, ADMIT, READS_GRAD, STATES, OPTIONS,
                    ELEMENT, PARAM, GRAD, STATE, COMPENSATED, LANES, TILE, ALIGNED,
                )  # fmt: skip
