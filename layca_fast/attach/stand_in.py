"""A second optimizer that takes the step of the first, on other tensors and without our keys in its state.

torch lets a hook before a step change the arguments of ``step``, and ``self`` is one of them. The stand-in is of the
same class and has the same attributes, groups and states. Only, float32 weights stand in the places of 16-bit
parameters, and the state of what turns has no radius: most optimizers make their state where there is none at all. An
exception in the step leaves nothing to restore: groups, weights and their types are as they were.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..messages import describe, labelled
from ..state.loading import ATTACHED
from ..state.sharding import local_of

#: Where the stand-in knows what made it. No name that an attribute could have by chance.
_MAKER = "layca_fast.stand_in"

_MISSING = object()

Filling = Callable[[], tuple[Mapping[Tensor, Tensor], set[Tensor]]]


def without_ours(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state as the other optimizer made it."""
    return {name: value for name, value in entry.items() if name not in ATTACHED}


def _version(param: Tensor) -> int:
    local = local_of(param)
    return 0 if local.is_inference() else local._version


class StandIn:
    """What makes the stand-in of ``optimizer`` for one step, and takes over what the step has done.

    ``filling`` returns the weights that stand in for parameters, by parameter, and all parameters whose states may hold
    keys of ours; it is asked again after a closure, which makes gradients and may change anything.
    """

    def __init__(self, optimizer: Optimizer, filling: Filling) -> None:
        self._real, self._filling = optimizer, filling
        self.weights: Mapping[Tensor, Tensor] = {}
        self._turning: set[Tensor] = set()
        self.optimizer: Optimizer = object.__new__(type(optimizer))
        vars(self.optimizer).update(vars(optimizer))
        self._attributes = dict(vars(optimizer))
        vars(self.optimizer)[_MAKER] = self
        self.optimizer.param_groups, self.optimizer.state = [], defaultdict(dict)
        self._fill()

    @staticmethod
    def of(args: tuple[Any, ...]) -> "StandIn | None":
        """Whose stand-in a step with these arguments was called with, if it was."""
        made: StandIn | None = vars(args[0]).get(_MAKER) if args and hasattr(args[0], "__dict__") else None
        return made

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of a step, for the stand-in to take it."""
        rest, named = list(args[1:]), dict(kwargs)
        if rest and callable(rest[0]):
            rest[0] = self._refilling(rest[0])
        elif callable(named.get("closure")):
            named["closure"] = self._refilling(named["closure"])
        return (self.optimizer, *rest), named

    def _refilling(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            loss = closure()
            self._fill()
            return loss

        return run

    def _fill(self) -> None:
        self.weights, self._turning = self._filling()
        real, copy = self._real, self.optimizer
        copy.param_groups[:] = [
            {**group, "params": [self.weights.get(param, param) for param in group["params"]]}
            for group in real.param_groups
        ]
        self._groups = [dict(group) for group in copy.param_groups]
        copy.state.clear()
        self._known = list(real.state)
        for key, entry in real.state.items():
            copy.state[self._weight_of(key)] = without_ours(entry) if self._turns(key) else entry
        self._versions = {param: _version(param) for param in self.weights}

    def _turns(self, key: Any) -> bool:
        return isinstance(key, Tensor) and key in self._turning

    def _weight_of(self, key: Any) -> Any:
        return self.weights.get(key, key) if isinstance(key, Tensor) else key

    def hand_over(self) -> None:
        """Give the optimizer what the step has left in the stand-in.

        Raises RuntimeError where the step wrote to parameters for which weights stood in.
        """
        self._check_parameters()
        real, copy = self._real, self.optimizer
        for name, value in vars(copy).items():
            if name not in ("param_groups", "state", _MAKER) and value is not self._attributes.get(name, _MISSING):
                setattr(real, name, value)
        for theirs, ours, before in zip(real.param_groups, copy.param_groups, self._groups, strict=False):
            changed = {name: value for name, value in ours.items() if value is not before.get(name, _MISSING)}
            theirs.update({name: value for name, value in changed.items() if name != "params"})
        owners = {weight: param for param, weight in self.weights.items()}
        left = {owners.get(key, key) if isinstance(key, Tensor) else key: entry for key, entry in copy.state.items()}
        state: MutableMapping[Any, Any] = real.state
        for key in self._known:
            if key not in left:
                state.pop(key, None)
        for key, entry in left.items():
            old = state.get(key)
            if old is None and len(entry) > 0:
                state[key] = entry
            elif old is not None and old is not entry:
                kept = {name: old[name] for name in ATTACHED if name in old}
                old.clear()
                old.update({**entry, **kept})

    def _check_parameters(self) -> None:
        for _, label, param in labelled(self._real.param_groups):
            if param in self._versions and self._versions[param] != _version(param):
                name = type(self._real).__name__
                raise RuntimeError(
                    f"{name} has stepped {describe(label, param)} itself, of which it was given a float32 weight in "
                    "its param groups: it keeps its parameters elsewhere, as wrappers do. Attach to the optimizer "
                    "inside it, or keep the parameters in float32; the weights have moved, so go on from a checkpoint"
                )
