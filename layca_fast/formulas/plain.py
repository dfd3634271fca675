"""Numbers of numpy and others as Python's own: ``torch.load(weights_only=True)`` takes no checkpoint with theirs."""

from collections.abc import Mapping, MutableMapping
from decimal import Decimal
from numbers import Integral, Real
from operator import is_
from typing import Any

from torch import Tensor

#: What needs no look: asked of every option at every step.
_PLAIN = frozenset({float, int, bool, str, type(None)})

#: Of a group, what is no option.
_NO_OPTIONS = ("params", "param_names")


def plain(value: Any) -> Any:
    """``value`` as bool, int, float or str, if it is a number or text of any type; sequences of these likewise.

    Arrays of numpy: of no dimension as a number, of one as a tuple. Everything else, tensors included, as it is.
    """
    if type(value) in _PLAIN or isinstance(value, Tensor):
        return value
    if type(value) in (tuple, list):
        made = list(map(plain, value))
        # A list that somebody else holds, too, stays the same object.
        return value if all(map(is_, made, value)) else type(value)(made)
    if hasattr(value, "dtype") and hasattr(value, "tolist") and getattr(value, "ndim", 2) <= 1:
        # numpy need not be there. What holds objects gives them back as they are.
        found = value.tolist()
        return tuple(map(plain, found)) if isinstance(found, list) else found
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, (Real, Decimal)):
        return float(value)
    return str(value) if isinstance(value, str) else value


def with_plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a group, or of other options, with :func:`plain` values."""
    return {name: value if name in _NO_OPTIONS else plain(value) for name, value in options.items()}


def settle(group: MutableMapping[str, Any]) -> None:
    """Make the values of a group plain, in place: schedulers multiply by numpy's numbers."""
    changed = {
        name: plain(value) for name, value in group.items() if type(value) not in _PLAIN and name not in _NO_OPTIONS
    }
    for name, value in changed.items():
        group[name] = value
