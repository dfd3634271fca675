"""Param groups that were checked, until something in them changes: what nobody has touched is not checked again."""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..formulas.options import check_groups, check_lr
from .watch import same_items

#: Values that stay what they are; tuples of them do, too.
_FIXED = frozenset({float, int, bool, str, type(None), torch.dtype})

#: What may be a function, of which only that is asked.
_FUNCTIONS = ("radius", "joins_at")

#: Which tensors a group has is asked elsewhere, and what they are called makes no difference.
_OTHERS = ("lr", "params", "param_names")


def _is_fixed(value: Any) -> bool:
    return type(value) in _FIXED or (type(value) is tuple and all(map(_is_fixed, value)))


class _Known:
    """A group as it was checked: its very objects, of which only the rate may be replaced."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.group = group
        self._keys, self._values = list(group), list(group.values())
        self._lr = self._keys.index("lr")
        #: Whether nothing can change but by another object in the place of one.
        self.is_fixed = type(group) is dict and all(
            name in _OTHERS or _is_fixed(value) or (name in _FUNCTIONS and callable(value))
            for name, value in group.items()
        )

    def holds(self, group: Mapping[str, Any]) -> bool:
        """Whether ``group`` is this one, and would be checked with the same result, but for a rate that is as good."""
        if group is not self.group or not self.is_fixed:
            return False
        lr = group.get("lr")
        if type(lr) is float:
            if not 0.0 <= lr < math.inf:
                return False
            self._values[self._lr] = lr
        elif isinstance(lr, Tensor):
            # Which number it holds changes in place.
            try:
                check_lr(lr)
            except (TypeError, ValueError):
                return False
        return same_items(group, self._keys, self._values)


class KnownGroups:
    """The groups of an optimizer, as they were last checked."""

    def __init__(self) -> None:
        self._known: list[_Known] = []
        self._edition: object | None = None

    def check(self, groups: Sequence[MutableMapping[str, Any]], step: int) -> object | None:
        """:func:`check_groups`, but of groups that are as they were the last time.

        Returns what is the same object for as long as all that fixes what a step does is the same, except for the
        tensors in the groups and their rates; None where that cannot be told.
        """
        known = self._known
        if len(known) == len(groups):
            for group, each in zip(groups, known, strict=True):
                if not each.holds(group):
                    break
            else:
                return self._edition
        self._known, self._edition = [], None
        check_groups(groups, step)
        self._known = list(map(_Known, groups))
        self._edition = object() if all(each.is_fixed for each in self._known) else None
        return self._edition
