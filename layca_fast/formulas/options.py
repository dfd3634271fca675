"""The options of a param group, and their checks: each error names the option, the value and the way out."""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .base_options import ROUNDING, not_negative
from .bases import BASES, Base
from .chunks import as_tuples, check_chunk_names, check_chunks
from .plain import settle
from .rotation import RULES

#: The names of the backends; ``backends/`` has one module for each.
BACKENDS = ("cuda", "triton", "cpu", "torch")

RADII = ("initial", "current", "learned")
STATE_DTYPES = (None, torch.bfloat16, torch.float32)

#: What every group holds whatever its base is.
COMMON_OPTIONS = (
    *("lr", "base", "rule", "rotate", "chunks", "chunk_names", "radius", "radius_lr", "joins_at", "weight_decay"),
    *("maximize", "compensate", "state_dtype", "capturable", "backend"),
)


def misspelt(group: Mapping[str, Any], others: Sequence[str] = ()) -> str | None:
    """What to warn of, if a key of a param group is next to one that is read; other keys are the user's own.

    ``others``: more names that are read.
    """
    known = [*COMMON_OPTIONS, "lr_factor", *others, *(name for base in BASES.values() for name in base.options)]
    for key in group:
        # OneCycleLR's "max_momentum" is further from "momentum" than this.
        close = [] if key in known else get_close_matches(str(key), known, n=1, cutoff=0.85)
        if close:
            return f"{key}={group[key]!r} is kept in the param group, but nothing reads it: did you mean {close[0]!r}?"
    return None


def check_lr(lr: Any, name: str = "lr") -> None:
    """Raise for a learning rate that is no finite number >= 0. One that lives on a device is not read back.

    A rate that is below zero by no more than ROUNDING counts as 0.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{name} is a tensor of shape {tuple(lr.shape)}: it must hold one number")
        if lr.device.type != "cpu":
            return
        if lr.untyped_storage().nbytes() == 0:
            raise ValueError(f"{name} is a tensor whose memory was freed: set it anew")
    elif not isinstance(lr, Real):
        raise TypeError(f"{name}={lr!r}: must be a number, or a tensor that holds one")
    if not (-ROUNDING <= float(lr) < math.inf):
        raise ValueError(f"{name}={lr!r}: must be finite and >= 0 (each step turns a layer by atan(lr) radians)")


def check_radius_lr(rate: Any) -> None:
    """Raise for a rate of learned radii that is no finite number >= 0."""
    if not isinstance(rate, Real):
        raise TypeError(f"radius_lr={rate!r}: must be a number, of which the rate of the radius is that many times lr")
    if not (0.0 <= float(rate) < math.inf):
        raise ValueError(
            f"radius_lr={rate!r}: must be finite and >= 0 (a step changes a learned radius by a factor of "
            "exp(radius_lr * lr) at most; 9 is the default, 0 keeps it)"
        )


def check_radius(radius: Any) -> None:
    """Raise for a radius that is no name of a rule, no function and no positive number."""
    if callable(radius):
        return
    if isinstance(radius, bool) or not isinstance(radius, Real):
        if not isinstance(radius, str) or radius not in RADII:
            raise ValueError(
                f"radius={radius!r} is unknown: choose one of {list(RADII)}, a number, or a function that makes one "
                "of a layer's shape"
            )
    elif not (0.0 < float(radius) < math.inf):
        raise ValueError(f"radius={radius!r}: must be finite and > 0, the norm that layers are put to")


def check_joins_at(norm: Any, radius: Any) -> None:
    """Raise for a norm to wait for that is none, or beside a radius that is given."""
    if callable(norm):
        pass
    elif isinstance(norm, bool) or not isinstance(norm, Real):
        raise TypeError(
            f"joins_at={norm!r}: must be the norm from which on a layer rotates, or a function that makes it of a "
            "layer's shape"
        )
    elif not (0.0 <= float(norm) < math.inf):
        raise ValueError(f"joins_at={norm!r}: must be finite and >= 0 (0: every layer rotates from the start)")
    if waits({"joins_at": norm}) and not isinstance(radius, str):
        raise ValueError(
            f"radius={radius!r} with joins_at={norm!r}: a layer that waits keeps the norm at which it joins; put "
            "radius='initial' into its group"
        )


def waits(group: Mapping[str, Any]) -> bool:
    """Whether layers of this group take plain steps until their norms have reached a stated value."""
    norm = group.get("joins_at", 0.0)
    return callable(norm) or bool(norm > 0)


def is_given(group: Mapping[str, Any]) -> bool:
    """Whether the group itself says what the norm of a layer is to be."""
    return not isinstance(group["radius"], str)


def check_choice(group: Mapping[str, Any], name: str, choices: tuple[Any, ...]) -> None:
    """Raise ValueError if the option ``name`` of ``group`` is none of ``choices``."""
    if group[name] not in choices:
        raise ValueError(f"{name}={group[name]!r} is unknown: choose one of {list(choices)}")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise for hyperparameters of a param group that are unknown or out of range."""
    check_lr(group["lr"])
    base = find_base(group["base"])
    lacking = [name for name in base.options if name not in group]
    if lacking:
        raise ValueError(f"base={base.name!r} needs {lacking}, which its param group lacks: set them in the group")
    base.check(group)
    check_choice(group, "rule", tuple(RULES))
    check_radius(group["radius"])
    check_radius_lr(group["radius_lr"])
    check_joins_at(group["joins_at"], group["radius"])
    check_choice(group, "backend", ("auto", *BACKENDS))
    check_choice(group, "maximize", (False, True))
    check_choice(group, "state_dtype", STATE_DTYPES)
    if not any(group["compensate"] is each for each in (None, True, False)):
        raise ValueError(
            f"compensate={group['compensate']!r}: must be True or False (whether 16-bit parameters keep the rest of "
            "their bits), or None (they do)"
        )
    check_choice(group, "capturable", (False, True))
    if group["rotate"] not in (None, True, False):
        raise ValueError(f"rotate={group['rotate']!r}: must be True, False, or None (all but vectors)")
    check_chunks(group["chunks"])
    check_chunk_names(group.get("chunk_names"), group["chunks"])
    decay = group["weight_decay"]
    if not isinstance(decay, Real) or not (-ROUNDING <= float(decay) < math.inf):
        raise ValueError(f"weight_decay={decay!r}: must be a finite number >= 0")


def check_groups(groups: Sequence[MutableMapping[str, Any]], step: int) -> None:
    """:func:`check_group` of all of them, whose numbers are made plain in place.

    The error tells the number of the step to come, to which schedules have led.

    ``step`` is 0 where none is coming. ValueError for a group without what every group has: one appended by hand.
    """
    for number, group in enumerate(groups):
        settle(group)
        tuples = as_tuples(group.get("chunks"))
        if tuples is not group.get("chunks"):
            group["chunks"] = tuples
        try:
            check_group(group)
        except KeyError as error:
            raise ValueError(
                f"group {number} of the optimizer lacks {error}, which every group has: add groups with "
                "optimizer.add_param_group(group), which completes them, not by appending to optimizer.param_groups"
            ) from None
        except (TypeError, ValueError) as error:
            if step == 0:
                raise
            raise type(error)(f"{error}; found at step {step}, in group {number}") from None


def decays(group: Mapping[str, Any]) -> bool:
    """Whether a group asks for weight decay."""
    return not_negative(group["weight_decay"]) > 0.0


def find_base(name: Any) -> Base:
    """The base optimizer called ``name``; ValueError with the valid names if there is none."""
    if not isinstance(name, str) or name not in BASES:
        raise ValueError(f"base={name!r} is unknown: {_base_meant(name)}choose one of {sorted(BASES)}")
    return BASES[name]


def _base_meant(name: Any) -> str:
    if str(name).lower() == "adamw":
        return "'adam' is it, for its weight decay is decoupled; "
    close = get_close_matches(str(name).lower(), BASES, n=1, cutoff=0.75)
    return f"did you mean {close[0]!r}? " if close else ""


def check_options(base: Base, given: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword that ``base`` does not have."""
    for name in given:
        if name not in base.options:
            others = sorted(each.name for each in BASES.values() if name in each.options)
            owner = f" (it belongs to {', '.join(others)})" if others else ""
            known = [*base.options, *COMMON_OPTIONS, "unscale_in_step"]
            close = [] if others else get_close_matches(str(name), known, n=1, cutoff=0.75)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            raise TypeError(
                f"{name}={given[name]!r} is no option of base={base.name!r}{owner}{meant}: it has "
                f"{sorted(base.options)}, beside those of every base (lr, rotate, chunks, "
                "rule, radius, weight_decay, ...)"
            )
