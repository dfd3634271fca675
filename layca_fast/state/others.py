"""What others put into param groups: options of their own under names that are ours, and groups without names."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..formulas.bases import BASES, Base

#: Only groups of FusedLayca have all of these.
OUR_OPTIONS = {"base", "rule", "rotate"}

#: The key of ``attach`` among the hooks of an optimizer. torch numbers hooks per process, so a number that came with a
#: pickle could be given again.
HOOK: Any = "layca_fast"

#: Names that wrappers and others give to numbers of their own, as WSAM and Lookahead do.
COMMON_NAMES = {"alpha"}


def option(optimizer: Any, group: Mapping[str, Any], name: str, default: Any) -> Any:
    """What a group of any optimizer says about an option of ours.

    The default where that is an option of the optimizer's own, as ``backend`` is of some, and so means something else.
    """
    theirs = getattr(optimizer, "defaults", {})
    if name in theirs and not theirs.keys() >= OUR_OPTIONS:
        return default
    return group.get(name, default)


def attached(optimizer: Any) -> Mapping[str, Any]:
    """The options that Layca was attached to an optimizer with; none where it was not."""
    hook = getattr(optimizer, "_optimizer_step_pre_hooks", {}).get(HOOK)
    options: Mapping[str, Any] = getattr(getattr(hook, "__self__", None), "options", {})
    return options


def unread(base: Base, given: Mapping[str, Any]) -> str | None:
    """What to warn of, if a group under ``base`` has an option that another base would read."""
    for name in given:
        owners = sorted(each.name for each in BASES.values() if name in each.options)
        if owners and name not in base.options and name not in COMMON_NAMES:
            return (
                f"{name}={given[name]!r} is kept in the param group, but base={base.name!r} does not read it: it "
                f"belongs to {', '.join(owners)}, and this base has {sorted(base.options)}"
            )
    return None


def _numbers(number: int, group: Mapping[str, Any]) -> list[str]:
    return [f"{number}.{index}" for index in range(len(group["params"]))]


class Names:
    """torch has names in all groups or in none: who has none gets "group.index" where others have some.

    ``new`` is a group on its way to ``groups``, which is changed so that torch takes it. Once it is there,
    :meth:`give_back` gives it its names, and :meth:`number_others` names the groups before it.
    """

    def __init__(self, new: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        self._groups, self._kept = groups, None
        params = new["params"]
        is_named = "param_names" in new or (isinstance(params, list) and bool(params) and isinstance(params[0], tuple))
        if not groups or is_named == ("param_names" in groups[0]):
            return
        if not is_named:
            new["param_names"] = _numbers(len(groups), {"params": params if isinstance(params, list) else [params]})
        elif all(isinstance(each, tuple) for each in params):
            self._kept = [name for name, _ in params]
            new["params"] = [param for _, param in params]
        elif "param_names" in new:
            self._kept = new.pop("param_names")

    def give_back(self) -> None:
        if self._kept is not None:
            self._groups[-1]["param_names"] = self._kept

    def number_others(self) -> None:
        if self._kept is not None:
            for number, group in enumerate(self._groups[:-1]):
                group.setdefault("param_names", _numbers(number, group))
