"""How numbers lie in memory and what formulas compute with: loads, stores and conversions of the Triton kernels.

``STORED`` is the type of an array in memory, ``ELEMENT`` the one to compute in. bfloat16 is stored as tl.int16: it is
the upper half of a float32, and the interpreter would not round to it. A 16-bit parameter and its remainder make one
float32 as ``layca_fast/compensation.py`` says.
"""

# Triton's values have no static types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# The compiler demands one type of all returns, but of a branch that it leaves out.

import torch
import triton.language as tl

from .formulas import constant, device_function

STORED = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.int16, torch.float16: tl.float16}

VECTOR = constant(16)  # bytes, as in launches.py

_EXPONENT = constant(0x7F800000)
# Exponents of float32: of 2**-14, the smallest that float16 has, and from its ulp's to that of a unit of its remainder.
_SMALLEST_EXPONENT, _UNIT_SHIFT, _SQUARE_OF_ONE = constant(113 << 23), constant(26 << 23), constant(254 << 23)
# A float32 of this size has whole numbers only: adding it rounds to one, which its lower bits then hold.
_WHOLE = constant(1.5 * 2.0**23)
_LARGEST_REST = constant(2.0**15)


@device_function
def pointers(address, lanes, STORED: tl.constexpr, ALIGNED: tl.constexpr):
    """The addresses of these lanes of an array."""
    # The hint sticks to the value it is given, so each copy of the code has its own cast to give it to.
    first = address.to(tl.pointer_type(STORED))
    if ALIGNED:
        first = tl.multiple_of(first, VECTOR)
    return first + lanes


@device_function
def _load_stored(address, lanes, inside, STORED: tl.constexpr, ALIGNED: tl.constexpr, POLICY: tl.constexpr):
    return tl.load(pointers(address, lanes, STORED, ALIGNED), mask=inside, other=0, eviction_policy=POLICY)


@device_function
def decode(stored, STORED: tl.constexpr, ELEMENT: tl.constexpr):
    """What the stored bits stand for."""
    if tl.int16 == STORED:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored.to(ELEMENT)


@device_function
def encode(x, STORED: tl.constexpr):
    """``x`` rounded to what can be stored, halves to even."""
    if tl.int16 == STORED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)
    else:
        return x.to(STORED)


@device_function
def load(
    address, lanes, inside,
    STORED: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """These lanes of an array, 0 where not ``inside``."""
    return decode(_load_stored(address, lanes, inside, STORED, ALIGNED, POLICY), STORED, ELEMENT)


@device_function
def _unit_exponent(half):
    return tl.maximum(half.to(tl.int32, bitcast=True) & _EXPONENT, _SMALLEST_EXPONENT) - _UNIT_SHIFT


@device_function
def _join(stored, remainder, STORED: tl.constexpr):
    if tl.int16 == STORED:
        bits, rest = stored.to(tl.int32), remainder.to(tl.int32)
        # A zero or an infinity that somebody else wrote, with a remainder that was not meant for it.
        rest = tl.where(((bits - 1) & 0x7FFF) >= 0x7F7F, tl.maximum(rest, 0), rest)
        return ((bits << 16) + rest).to(tl.float32, bitcast=True)
    else:
        half = stored.to(tl.float32)
        return half + remainder.to(tl.float32) * _unit_exponent(half).to(tl.float32, bitcast=True)


@device_function
def _split(x, STORED: tl.constexpr):
    if tl.int16 == STORED:
        bits = x.to(tl.int32, bitcast=True)
        # Rounding some of the bits that stand for NaN would make a zero of them.
        stored = tl.where(x == x, (bits + 0x8000) >> 16, 0x7FC0)
        rest = tl.where(x == x, bits, 0)
        return stored.to(tl.int16), rest.to(tl.int16)
    else:
        half = x.to(tl.float16)
        wide = half.to(tl.float32)
        # The reciprocal, a power of two as well.
        scale = (_SQUARE_OF_ONE - _unit_exponent(wide)).to(tl.float32, bitcast=True)
        rest = (x - wide) * scale
        # Of an infinite parameter, and of NaN, nothing is left.
        rest = tl.where(tl.abs(rest) <= _LARGEST_REST, tl.minimum(rest, _LARGEST_REST - 1.0), 0.0) + _WHOLE
        return half, rest.to(tl.int32, bitcast=True).to(tl.int16)


@device_function
def load_weight(
    addresses, lanes, inside,
    PARAM: tl.constexpr, ELEMENT: tl.constexpr, COMPENSATED: tl.constexpr, ALIGNED: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """The weights that (parameter, remainder) stand for; ``addresses`` begins with both."""
    stored = _load_stored(addresses[0], lanes, inside, PARAM, ALIGNED, POLICY)
    if COMPENSATED:
        remainder = _load_stored(addresses[1], lanes, inside, tl.int16, ALIGNED, POLICY)
        return _join(stored, remainder, PARAM)
    else:
        return decode(stored, PARAM, ELEMENT)


@device_function
def store_weight(
    addresses, lanes, inside, weight, PARAM: tl.constexpr, COMPENSATED: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Write them back."""
    if COMPENSATED:
        stored, remainder = _split(weight, PARAM)
        tl.store(pointers(addresses[1], lanes, tl.int16, ALIGNED), remainder, mask=inside)
    else:
        stored = encode(weight, PARAM)
    tl.store(pointers(addresses[0], lanes, PARAM, ALIGNED), stored, mask=inside)
