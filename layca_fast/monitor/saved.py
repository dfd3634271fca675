"""What a saved RotationMonitor must hold to be gone on from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .curves import QUANTITIES


def check_saved(
    saved: Mapping[str, Any], settings: Mapping[str, Any], shapes: Mapping[str, Sequence[tuple[int, ...]]]
) -> None:
    """Raise ValueError for a ``state_dict`` whose parts are missing, or fit neither each other nor the loading monitor.

    ``settings``: what it must say of its monitor; ``shapes``: those of the tensors that this monitor keeps of the start
    and of the record before. Modifies nothing.
    """
    _check_parts(saved, settings)
    for name, here in settings.items():
        if saved[name] != here:
            raise ValueError(
                f"state_dict: was saved with {name}={saved[name]!r}, but this monitor has {name}={here!r}: make it as "
                "the other was made"
            )
    for name, known in shapes.items():
        found = [tuple(tensor.shape) for tensor in saved[name]]
        if found != list(known):
            raise ValueError(
                f"state_dict: was saved from weights of shapes {found}, but those watched here have {list(known)}"
            )


def _check_parts(saved: Mapping[str, Any], settings: Iterable[str]) -> None:
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
    for name in ("start_squares", *(("before_squares",) if saved.get("per_step") else ())):
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
