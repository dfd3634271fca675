"""What an optimizer's state, its groups and a checkpoint are made of: errors that say what is missing or wrong."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..messages import describe, labelled


def check_entries(groups: Sequence[Mapping[str, Any]], state: Any) -> None:
    """Raise TypeError for an optimizer's state, or what it holds for a parameter, that is no dict."""
    for number, group in enumerate(groups):
        if "params" not in group:
            raise ValueError(f"group {number} of the optimizer lacks 'params', the list of its parameters: put it back")
    if not isinstance(state, Mapping):
        raise TypeError(f"optimizer.state is a {type(state).__name__}: it must be a dict from parameters to dicts")
    for _, label, param in labelled(groups):
        entry = state.get(param, {})
        if not isinstance(entry, Mapping):
            raise TypeError(
                f"the state of {describe(label, param)} is {entry!r}: it must be a dict; to clear it, "
                "del optimizer.state[parameter]"
            )


def check_saved(saved: Any) -> None:
    """Raise TypeError or ValueError for what no optimizer's ``state_dict()`` returns."""
    if not isinstance(saved, Mapping):
        raise TypeError(
            f"state_dict is a {type(saved).__name__}: pass what optimizer.state_dict() returned, a dict with the keys "
            "'state' and 'param_groups'"
        )
    for key, wanted, what in (("state", Mapping, "a dict"), ("param_groups", Sequence, "a list")):
        if key not in saved:
            raise ValueError(
                f"state_dict has no {key!r}, only {[str(each) for each in saved][:5]}: pass what "
                "optimizer.state_dict() returned; of a larger checkpoint, its part for the optimizer"
            )
        if not isinstance(saved[key], wanted) or isinstance(saved[key], str):
            raise TypeError(f"state_dict: {key!r} is a {type(saved[key]).__name__}: it must be {what}")
    for number, group in enumerate(saved["param_groups"]):
        if not isinstance(group, Mapping) or "params" not in group:
            raise ValueError(f"state_dict: group {number} is no dict with the key 'params': {group!r:.80}")
    for key, entry in saved["state"].items():
        if not isinstance(entry, Mapping) and not isinstance(key, Tensor):
            kind = type(entry).__name__
            raise TypeError(f"state_dict: the state of parameter {key!r} is a {kind}: it must be a dict")


def mapped(value: Any, kind: type | tuple[type, ...], convert: Callable[[Any], Any]) -> Any:
    """A state with all of a ``kind`` in it converted, in whatever lists and dicts: as torch goes through what it loads.

    What holds nothing of the kind is returned as it is.
    """
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, dict):
        found = {name: mapped(each, kind, convert) for name, each in value.items()}
        return found if any(found[name] is not value[name] for name in found) else value
    if type(value) in (list, tuple):
        items = [mapped(each, kind, convert) for each in value]
        return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value
