"""A second optimizer that takes the step of the first, on other tensors and without our keys in its state.

torch lets a hook before a step change the arguments of ``step``, and ``self`` is one of them. The stand-in is of the
same class and has the same attributes, groups and states. Only, float32 weights stand in the places of 16-bit
parameters, and the state of what turns has no radius: most optimizers make their state where there is none at all. An
exception in the step leaves nothing to restore: groups, weights and their types are as they were.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..compat import version_of
from ..messages import describe, labelled
from ..state.attached import ATTACHED
from ..state.sharding import local_of

#: Attributes that the stand-in does not share.
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_APART = ("param_groups", "state", *_HOOKS)

_MISSING = object()

Filling = Callable[[], tuple[Mapping[Tensor, Tensor], set[Tensor]]]


def without_ours(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state as the other optimizer made it."""
    return {name: value for name, value in entry.items() if name not in ATTACHED}


class StandIn:
    """What steps in the place of an optimizer, of which ``kind`` is the class: one step at a time, from :meth:`enter`.

    Between steps it holds nothing, but after one that has failed, until the next. It stays the same object, so that a
    compiled step finds it again.
    """

    def __init__(self, kind: type[Optimizer]) -> None:
        self.weights: Mapping[Tensor, Tensor] = {}
        self.optimizer: Optimizer = object.__new__(kind)

    def enter(self, optimizer: Optimizer, filling: Filling) -> None:
        """Be ready for a step of ``optimizer``.

        ``filling`` returns the weights that stand in for parameters, by parameter, and all parameters whose states may
        hold keys of ours; it is asked again after a closure, which makes gradients and may change anything.
        """
        self._real, self._filling = optimizer, filling
        self._attributes = dict(vars(optimizer))
        mine = vars(self.optimizer)
        mine.clear()
        # Hooks are the optimizer's own affair: torch would run them once more where a class calls super().step().
        mine.update({name: OrderedDict() if name in _HOOKS else value for name, value in self._attributes.items()})
        mine.pop("__getstate__", None)
        mine["param_groups"], mine["state"] = [], defaultdict(dict)
        if any(getattr(self.optimizer, name) is not mine[name] for name in ("param_groups", "state")):
            raise TypeError(
                f"{type(optimizer).__name__} has no param_groups or state of its own, as wrappers do that hand out "
                "those of an optimizer inside them: attach to that one"
            )
        self._fill()

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
        self._versions = {param: version_of(local_of(param)) for param in self.weights}

    def _turns(self, key: Any) -> bool:
        return isinstance(key, Tensor) and key in self._turning

    def _weight_of(self, key: Any) -> Any:
        return self.weights.get(key, key) if isinstance(key, Tensor) else key

    def hand_over(self) -> Mapping[Tensor, Tensor]:
        """Give the optimizer what the step has left in the stand-in; returns the weights that stood in for parameters.

        Raises RuntimeError where the step wrote to parameters for which weights stood in.
        """
        self._check_parameters()
        real, copy = self._real, self.optimizer
        for name, value in vars(copy).items():
            if name not in _APART and value is not self._attributes.get(name, _MISSING):
                setattr(real, name, value)
        for theirs, ours, before in zip(real.param_groups, copy.param_groups, self._groups, strict=False):
            changed = {name: value for name, value in ours.items() if value is not before.get(name, _MISSING)}
            theirs.update({name: value for name, value in changed.items() if name != "params"})
        owners = {weight: param for param, weight in self.weights.items()}
        # Some optimizers keep what is no parameter's, too.
        state: MutableMapping[Any, Any] = real.state
        made: Mapping[Any, Any] = copy.state
        left = {owners.get(key, key) if isinstance(key, Tensor) else key: entry for key, entry in made.items()}
        for key in self._known:
            if key not in left:
                state.pop(key, None)
        for key, entry in left.items():
            old = state.get(key)
            if isinstance(old, dict) and isinstance(entry, dict):
                if old is not entry:
                    kept = {name: old[name] for name in ATTACHED if name in old}
                    old.clear()
                    old.update({**entry, **kept})
            elif entry or not isinstance(entry, dict):
                state[key] = entry
        weights = self.weights
        self._leave()
        return weights

    def _leave(self) -> None:
        """Hold nothing: not the optimizer, which holds this one, nor what a step has left."""
        vars(self.optimizer).clear()
        self.weights, self._turning, self._known = {}, set(), []
        self._attributes, self._groups, self._versions = {}, [], {}
        del self._real, self._filling

    def _check_parameters(self) -> None:
        for _, label, param in labelled(self._real.param_groups):
            if param in self._versions and self._versions[param] != version_of(local_of(param)):
                name = type(self._real).__name__
                raise RuntimeError(
                    f"{name} has stepped {describe(label, param)} itself, of which it was given a float32 weight in "
                    "its param groups: it keeps its parameters elsewhere, as wrappers do. Attach to the optimizer "
                    "inside it, or keep the parameters in float32; the weights have moved, so go on from a checkpoint"
                )
