"""What one program does with its tile: load, advance, make the base step, sum the dots, rotate, store.

Addresses come out of the tensor table as integers, so Triton knows nothing about their alignment. Tiles whose
addresses and length are multiples of 16 bytes take a copy of the code that is told so, in which loads and stores are
128 bits wide; all others take a copy that is not. Both mask by the tile's length: that costs no width once the compiler
knows that no vector straddles the end.
"""

# Triton's values have no static types, and its compiler knows no starred tuples.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

import triton.language as tl

from .columns import _A, _B, _C, _GRAD, _GRAD_SCALE, _MAX_OPTIONS, _MODE, _OPTION, _PARAM, _PRECISE, _REMAINDER, _STATE
from .formulas import device_function, finite_or_zero
from .types import VECTOR, decode, encode, load, load_weight, pointers, store_weight


@device_function
def _address(row, column, start, STORED: tl.constexpr):
    return tl.load(row + column) + start * (STORED.primitive_bitwidth // 8)


@device_function
def addresses_of(row, start, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, STATES: tl.constexpr):
    """(parameter, remainder, gradient, state ...) of the tensor's element ``start``; the remainder may not be there."""
    addresses = (_address(row, _PARAM, start, PARAM), _address(row, _REMAINDER, start, tl.int16))
    addresses = addresses + (_address(row, _GRAD, start, GRAD),)
    for i in tl.static_range(STATES):
        addresses = addresses + (_address(row, _STATE + i, start, STATE),)
    return addresses


@device_function
def is_aligned(
    addresses, length, READS_GRAD: tl.constexpr, STATES: tl.constexpr, COMPENSATED: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Whether addresses and length are multiples of 16 bytes: 1 or 0."""
    bits = addresses[0]
    if COMPENSATED:
        bits = bits | addresses[1]
    if READS_GRAD:
        bits = bits | addresses[2]
    for i in tl.static_range(STATES):
        bits = bits | addresses[3 + i]
    return ((bits % VECTOR == 0) & (length % LANES == 0)).to(tl.int32)


@device_function
def options_row_of(hyper, step_options, tensor, COUNTS: tl.constexpr):
    """Where the options of a tensor stand."""
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
def measure_tile(
    addresses, length, hyper, options_row, partials, partial_counts,
    ADVANCE: tl.constexpr, STEP: tl.constexpr, ADMIT: tl.constexpr, SQUARES: tl.constexpr,
    READS_GRAD: tl.constexpr, STATES: tl.constexpr, OPTIONS: tl.constexpr,
    ELEMENT: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    COMPENSATED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Advance the states of a tile (in place); store its three dots and its number of non-finite elements."""
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


@device_function
def step_again(
    addresses, hyper, options_row, lanes, inside,
    STEP: tl.constexpr, ADMIT: tl.constexpr, READS_GRAD: tl.constexpr, STATES: tl.constexpr, OPTIONS: tl.constexpr,
    ELEMENT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The base step of these elements, made of the advanced state."""
    if READS_GRAD:
        grad, _ = _load_gradient(addresses[2], hyper, lanes, inside, ADMIT, GRAD, ELEMENT, ALIGNED, "evict_first")
    else:
        grad = 0.0
    state = ()
    for i in tl.static_range(STATES):
        state = state + (load(addresses[3 + i], lanes, inside, STATE, ELEMENT, ALIGNED, "evict_first"),)
    return finite_or_zero(STEP(grad, state, _options(options_row, OPTIONS, ELEMENT)))


@device_function
def rotate_tile(
    addresses, length, hyper, options_row, coefficients,
    STEP: tl.constexpr, ADMIT: tl.constexpr, READS_GRAD: tl.constexpr, STATES: tl.constexpr, OPTIONS: tl.constexpr,
    ELEMENT: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    COMPENSATED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Apply the coefficients of its layer to the parameters of a tile (in place)."""
    lanes = tl.arange(0, TILE)
    inside = _inside(lanes, length, LANES, ALIGNED)
    w = load_weight(addresses, lanes, inside, PARAM, ELEMENT, COMPENSATED, ALIGNED, "evict_first")
    u = step_again(
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
