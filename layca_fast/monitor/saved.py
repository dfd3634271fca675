"""What a saved RotationMonitor must hold to be gone on from."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .curves import QUANTITIES


def check_saved(saved: Mapping[str, Any], settings: Sequence[str], keeps_before: bool) -> None:
    """Raise ValueError for a ``state_dict`` whose parts are missing or do not fit each other. Modifies nothing.

    ``settings``: the names of what it must say of its monitor; ``keeps_before``: whether there are copies from each
    record.
    """
    lacking = [
        name for name in (*settings, "step", "steps", *QUANTITIES, "start", "start_squares") if name not in saved
    ]
    lacking += [name for name in ("before", "before_squares") if name not in saved]
    if lacking:
        raise ValueError(f"state_dict: lacks {lacking}: save what state_dict() of a RotationMonitor returned")
    if isinstance(saved["step"], bool) or not isinstance(saved["step"], int):
        raise ValueError(f"state_dict: step={saved['step']!r} is no whole number")
    if not all(isinstance(step, int) for step in saved["steps"]):
        raise ValueError("state_dict: 'steps' holds something else than whole numbers")
    records, layers = len(saved["steps"]), len(saved["names"])
    for name in QUANTITIES:
        _check_shape(name, saved[name], (records, layers), f"{records} steps of {layers} layers")
    for name in ("start_squares", *(("before_squares",) if keeps_before else ())):
        _check_shape(name, saved[name], (layers,), f"{layers} layers")
    for name in ("start", "before"):
        for index, kept in enumerate(saved[name]):
            if not isinstance(kept, Tensor):
                raise ValueError(f"state_dict: {name!r} holds a {type(kept).__name__} at {index}, and no tensor")


def _check_shape(name: str, value: Any, expected: tuple[int, ...], what: str) -> None:
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    if shape != expected:
        found = f"a {type(value).__name__}" if shape is None else f"of shape {shape}"
        raise ValueError(f"state_dict: {name!r} is {found} beside {what}: it must be a tensor of shape {expected}")
