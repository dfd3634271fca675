"""16-bit parameters: what their type cannot hold of a weight is kept beside them, in the state ``remainder``.

A pair (parameter, remainder) stands for one float32, the weight. The remainder is a signed 16-bit integer, kept as raw
bits in a tensor of the parameter's type: collectives refuse int16, and after a cast of the parameter the type says that
it completed another one.

- bfloat16 is the upper half of a float32: float32 bits = (bfloat16 bits << 16) + remainder. The parameter is that
  float32 rounded, halves away from zero, and the pair is the float32 exactly. From 1.99609375 * 2**127 on the parameter
  is infinite, and so is the weight.
- float16 has exponents of its own: weight = parameter + remainder * 2**-16 ulp(parameter) as a float32, where the
  parameter is the weight rounded, halves to even. (Half an ulp upward is one unit more than the remainder can say. The
  sum rounds to it.) That is exact wherever 2**-16 <= abs(weight) < 65520; below, where the ulp of float16 stays 2**-24,
  the weight is off by 2**-41 at most, halfway between two float16 numbers by 2**-40. Over 1,000 steps these roundings
  add up to 8e-12 per weight: within 1e-6 of the norm of a layer whose root mean square is 1e-5 or more. No remainder of
  16 bits does better: the parameter itself holds only 8 bits of a weight of 1e-5, 4 of one of 1e-6. A float32 copy
  would, for two more bytes to keep per weight, which both passes read, and it would silently undo what is written to
  the parameter from outside. From 65520 on the parameter is infinite, as in any float16 training.

Where somebody else writes to the parameter, the old remainder stays: the weight is then within half an ulp of what was
written, and not finite where that was not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: Types of parameters whose formulas run in float32.
HALVES = (torch.bfloat16, torch.float16)

_EXPONENT = 0x7F800000
#: The exponent of 2**-14 as a float32 has it: the ulp of float16 is the same for all below it.
_SMALLEST_EXPONENT = 113 << 23
#: From the exponent of a float16 to that of a unit of its remainder: 2**-10 is its ulp, of which it is 2**-16.
_UNIT_SHIFT = 26 << 23
_LARGEST_REST = 2**15 - 1


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that formulas on parameters of this dtype run in."""
    return torch.float32 if dtype in HALVES else dtype


def state_dtype(dtype: torch.dtype, group: Mapping[str, Any]) -> torch.dtype:
    """The type of the base optimizer's buffers for a parameter of this dtype in ``group``."""
    return group["state_dtype"] or torch.float32 if dtype in HALVES else dtype


def is_compensated(dtype: torch.dtype, group: Mapping[str, Any]) -> bool:
    """Whether a parameter of this dtype in ``group`` has a remainder."""
    return dtype in HALVES and group["compensate"] is not False


def smallest_rotation(dtype: torch.dtype) -> float:
    """Half an ulp of 1: a weight that changes by a smaller part of itself, alone in its type, is rounded back."""
    return torch.finfo(dtype).eps / 2


def fits(remainder: Tensor | None, param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether ``remainder``, or that there is none (None), completes this parameter of ``group`` as it is now."""
    if not is_compensated(param.dtype, group):
        return remainder is None
    return remainder is not None and remainder.dtype == param.dtype


def lost_rotation(members: Sequence[tuple[Mapping[str, Any], str, Tensor]]) -> str | None:
    """What to warn of, if one of these rotating parameters turns by less than its type carries and no remainder does.

    Rates that live on a device are not read.
    """
    for group, label, param in members:
        lr = group["lr"]
        if param.dtype not in HALVES or is_compensated(param.dtype, group):
            continue
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            continue
        smallest = smallest_rotation(param.dtype)
        if 0.0 < float(lr) < smallest:
            return (
                f"compensate=False: at lr={float(lr):g} most of the rotation of {label} is rounded away. The smallest "
                f"that {param.dtype} can carry is {smallest:g} radians: set lr to that or more, or compensate=True"
            )
    return None


def _unit(half: Tensor) -> Tensor:
    """What one unit of the remainder of these float16 numbers, given as float32, is worth."""
    exponent = (half.view(torch.int32) & _EXPONENT).clamp(min=_SMALLEST_EXPONENT)
    return (exponent - _UNIT_SHIFT).view(torch.float32)


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 weights that a 16-bit parameter and its remainder, both of one shape, stand for: a new tensor."""
    rest = remainder.view(torch.int16)
    if param.dtype == torch.float16:
        half = param.float()
        return half + rest * _unit(half)
    bits = param.view(torch.int16).int()
    # Whoever writes to a parameter leaves the old remainder. A negative one would make NaN of zero, and a number of
    # infinity.
    rest = torch.where((bits - 1) & 0x7FFF >= 0x7F7F, rest.clamp(min=0), rest)
    return ((bits << 16) + rest).view(torch.float32)


def split(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Float32 weights as (parameter of this 16-bit type, remainder): new tensors, of the weights' shape."""
    if dtype == torch.float16:
        param = weight.half()
        half = param.float()
        rest = (weight - half) / _unit(half)
        # Of an infinite parameter, and of NaN, nothing is left.
        rest = torch.where(rest.isfinite(), rest.round().clamp(max=_LARGEST_REST), 0.0)
        return param, rest.to(torch.int16).view(dtype)
    bits = weight.view(torch.int32)
    # Rounding some of the bits that stand for NaN would make a zero of them.
    upper = torch.where(weight.isnan(), 0x7FC0, (bits + 0x8000) >> 16)
    lower = torch.where(weight.isnan(), 0, (bits << 16) >> 16)
    return upper.to(torch.int16).view(dtype), lower.to(torch.int16).view(dtype)
