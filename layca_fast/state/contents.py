"""What a saved state may hold: numbers that some run can have left. Anything else is refused before it is taken over.

A checkpoint that was cut, mixed up with another optimizer's, or written by a run that had already failed, would freeze
layers or throw them far away, and say nothing.
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..formulas.bases import FORMULAS, SQUARES, Formula
from ..messages import describe
from .compensation import HALVES
from .radii import largest_radius
from .sharding import local_of

#: The buffers of base optimizers, by name.
BUFFERS = {name for formula in FORMULAS.values() for name in formula.states}

_WAY_OUT = "load a checkpoint of the optimizer and model that are here, or leave this parameter's state out"


def check_complete(formula: Formula, state: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a state that has some buffers of ``formula`` but not those without which they say nothing.

    Another optimizer's means, without the squares that they are divided by, would make steps of any length. Buffers
    that an option adds, such as amsgrad's, may be missing: they begin when the option does.
    """
    has = [name for name in formula.states if state.get(name) is not None]
    square = next((name for name in formula.states if name in SQUARES), None)
    for needed in (square, "step" if formula.counts_steps else None):
        if has and needed is not None and state.get(needed) is None:
            raise ValueError(
                f"the state of {where} has {has[0]!r} but no {needed!r}, as that of another optimizer may: "
                f"{formula.name!r} cannot go on from it. Load one that has both, or clear the optimizer's state for "
                "the parameter, del optimizer.state[parameter]"
            )


def check_contents(name: str, value: Any, param: Tensor, label: str, layers: int) -> None:
    """Raise ValueError for a state called ``name`` of ``param``, with so many layers, that no run can have left.

    None stands for a buffer that is not there. Waits for the device of ``value``.
    """
    where = describe(label, param)
    if value is None or (name not in BUFFERS and name not in ("radius", "step", "remainder")):
        return
    if name == "step":
        _check_count(value, where)
        return
    if not isinstance(value, Tensor):
        raise ValueError(f"state_dict: {name!r} is a {type(value).__name__} for {where}, and no tensor: {_WAY_OUT}")
    if name == "remainder":
        if value.dtype not in HALVES:
            raise ValueError(
                f"state_dict: {name!r} has dtype {value.dtype} for {where}: it holds raw bits in a tensor of a 16-bit "
                "type, which no conversion keeps. Load it as it was saved, or leave it out"
            )
        return
    if not value.is_floating_point():
        raise ValueError(f"state_dict: {name!r} has dtype {value.dtype} for {where}: {_WAY_OUT}")
    least, largest = _range_of(local_of(value))
    low = 0.0 if name in SQUARES else -math.inf
    if not (least >= low and math.isfinite(least) and math.isfinite(largest)):
        bad = least if not (least >= low and math.isfinite(least)) else largest
        kind = "finite numbers >= 0" if low == 0.0 else "finite numbers"
        raise ValueError(f"state_dict: {name!r} holds {bad} for {where}: it must hold {kind}; {_WAY_OUT}")
    if name == "radius":
        highest = largest_radius(param, max(param.numel() // max(layers, 1), 1))
        farthest = max(largest, -least)
        if farthest >= highest:
            raise ValueError(
                f"state_dict: 'radius' holds {farthest:g} for {where}, the norm of no layer of that type and size "
                f"(less than {highest:g}): {_WAY_OUT}"
            )


def _range_of(value: Tensor) -> tuple[float, float]:
    """The smallest and the largest element; NaN if there is one, 0 if there is none."""
    if value.numel() == 0 or value.is_meta:
        return 0.0, 0.0
    if value.element_size() < 2:
        value = value.float()
    least, largest = torch.aminmax(value.detach())
    return float(least), float(largest)


def _check_count(step: Any, where: str) -> None:
    """A number of steps: 0-d tensor, or the plain number that older versions of torch saved."""
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.is_complex():
            # Its shape is told elsewhere.
            return
        count = float(local_of(step))
    elif isinstance(step, Real):
        count = float(step)
    else:
        raise ValueError(f"state_dict: 'step' is a {type(step).__name__} for {where}: it must be a 0-d tensor")
    if not 0 <= count < math.inf:
        raise ValueError(f"state_dict: 'step' is {count} for {where}: it must be a finite number >= 0")
