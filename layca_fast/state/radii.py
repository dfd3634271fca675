"""Radii that groups give instead of taking them from the weights: numbers, and functions of a layer's shape.

Of a layer that is not on its sphere yet, the state "radius" is 0 where its first turn takes the radius, and -R where R
is given: what the first turn leads to (``radius``), or the norm from which on the layer turns (``joins_at``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..formulas.options import is_given, waits
from ..formulas.plain import plain
from ..messages import describe
from .compensation import compute_dtype
from .cut import Cut

#: What a state_dict has in the place of a function, which no checkpoint can hold.
FUNCTION = "function"

#: Options that may be functions.
MAY_BE_FUNCTIONS = ("radius", "joins_at")


def has_radii_ahead(group: Mapping[str, Any]) -> bool:
    """Whether radius states of this group may be below 0."""
    return waits(group) or is_given({"radius": group.get("radius", "initial")})


def largest_radius(param: Tensor, size: int) -> float:
    """Of a layer of ``size`` elements whose weights can be squared: nothing trains beyond."""
    largest = torch.finfo(param.dtype).max
    if param.dtype != torch.float16:
        largest = math.sqrt(torch.finfo(compute_dtype(param.dtype)).max)
    return largest * math.sqrt(size)


def _shapes(cut: Cut) -> list[torch.Size]:
    """The shape of each layer as (rows, all else), as base="muon" views it; a row of a matrix has one."""
    shapes = []
    for part in range(cut.parts):
        shape = cut.layer_shape(part)
        if len(shape) < min(len(cut.shape), 2):
            shape = (1, *shape)
        shapes.append(torch.Size((shape[0] if shape else 1, math.prod(shape[1:]))))
    return shapes * (cut.layers // cut.parts)


def _number_of(function: Callable[[torch.Size], Any], shape: torch.Size, name: str, where: str) -> float:
    """What a function of a group makes of a shape; ValueError where that is no positive finite number."""
    try:
        made = function(shape)
        if isinstance(made, Tensor) and made.numel() == 1:
            made = made.item()
    except Exception as error:
        raise ValueError(
            f"{name}: the function failed for a layer of shape {tuple(shape)} of {where}: "
            f"{type(error).__name__}: {error}"
        ) from error
    number = plain(made)
    if isinstance(number, bool) or not isinstance(number, Real) or not (0.0 < float(number) < math.inf):
        raise ValueError(
            f"{name}: the function gave {made!r} for a layer of shape {tuple(shape)} of {where}: it must give a finite "
            "number > 0, the norm of that layer"
        )
    return float(number)


def without_functions(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group as a state_dict has it."""
    return {name: FUNCTION if name in MAY_BE_FUNCTIONS and callable(value) else value for name, value in group.items()}


def with_functions(
    present: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The ``saved`` groups with the functions of an optimizer whose groups are ``present``, where they had some.

    ``groups`` have the parameters that the saved ones are to hold. Raises ValueError where the optimizer has none.
    """
    owners = {id(param): group for group in present for param in group["params"]}
    found = []
    for number, theirs in enumerate(saved):
        lacking = [name for name in MAY_BE_FUNCTIONS if isinstance(theirs.get(name), str) and theirs[name] == FUNCTION]
        params = groups[number]["params"] if number < len(groups) else []
        ours = {}
        for name in lacking:
            known = {id(value): value for param in params if callable(value := owners[id(param)].get(name))}
            if len(known) != 1:
                raise ValueError(
                    f"state_dict: the {name} of group {number} was a function, which no checkpoint holds: give the "
                    "parameters of that group the same one here, or replace it in what you load, "
                    f"state_dict['param_groups'][{number}][{name!r}] = "
                    f"{'0.0' if name == 'joins_at' else repr('initial')}"
                )
            (ours[name],) = known.values()
        found.append({**theirs, **ours})
    return found


def settle(radius: Tensor, starts: Sequence[float] | None) -> None:
    """Say, in the state of layers that are not on their spheres yet, what these will be; without a wait for the device.

    ``starts``: of :func:`starting_radii`, those of the layers in ``radius``.
    """
    if starts is None:
        # They may have waited for something that the group no longer asks for.
        radius.clamp_(min=0.0)
    elif len(radius) > 0:
        ahead = torch.tensor(starts, dtype=radius.dtype, device=radius.device)
        radius.copy_(torch.where(radius > 0, radius, ahead))


def starting_radii(param: Tensor, group: Mapping[str, Any], cut: Cut, label: str) -> Sequence[float] | None:
    """The state "radius" with which each layer of a rotating tensor begins, where its group gives one; None for 0.

    Of a DTensor those of all its layers. Raises ValueError, naming the tensor, where a function gives no norm, and for
    one that the tensor's type cannot hold.
    """
    name = "joins_at" if waits(group) else "radius"
    value = group[name]
    if isinstance(value, str):
        return None
    where = describe(label, param)
    shapes = _shapes(cut)
    made = {
        shape: _number_of(value, shape, name, where) if callable(value) else float(value)
        for shape in dict.fromkeys(shapes)
    }
    kind = torch.finfo(param.dtype)
    for shape, radius in made.items():
        size = max(shape.numel(), 1)
        low, high = kind.tiny * kind.eps * math.sqrt(size), largest_radius(param, size)
        if not low <= radius < high:
            raise ValueError(
                f"{name} is {radius:g} for a layer of shape {tuple(shape)} of {where}: no such layer has that norm; "
                f"choose one from {low:.3g} to {high:.3g}"
            )
    return [-made[shape] for shape in shapes]
