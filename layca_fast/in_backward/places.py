"""One parameter as a plan of that parameter alone sees it: as if the optimizer had no other."""

from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..state.members import State


class _StateOf(MutableMapping[Tensor, dict[str, Any]]):
    """What an optimizer's state holds for one parameter, as a plan of that parameter alone reads and creates it."""

    def __init__(self, state: State, param: Tensor) -> None:
        self._state, self._param = state, param

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        return self._state[param]

    def get(self, param: Tensor, default: Any = None) -> Any:
        # The one inherited would ask a defaultdict by [], which creates what is not there.
        return self._state.get(param, default)

    def __setitem__(self, param: Tensor, value: dict[str, Any]) -> None:
        self._state[param] = value

    def __delitem__(self, param: Tensor) -> None:
        del self._state[param]

    def __iter__(self) -> Iterator[Tensor]:
        return iter([self._param] if self._param in self._state else [])

    def __len__(self) -> int:
        return int(self._param in self._state)


class _Position(str):
    """What stands for the name of a parameter that has none: messages show it without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class Place(NamedTuple):
    """One parameter as its plan sees it: groups that hold it alone and follow its own group, and its state."""

    groups: list[Mapping[str, Any]]
    state: _StateOf


def places(param_groups: Sequence[dict[str, Any]], state: State) -> dict[Tensor, Place]:
    """The place of every parameter, in the order of the groups."""
    found = {}
    for number, group in enumerate(param_groups):
        names = group.get("param_names") or ()
        for index, param in enumerate(group["params"]):
            name = names[index] if index < len(names) else _Position(f"{index} of group {number}")
            alone: dict[str, Any] = {"params": [param], "param_names": [name]}
            found[param] = Place([ChainMap(alone, group)], _StateOf(state, param))
    return found
