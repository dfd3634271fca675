"""Loading a state_dict without changing the types of what it holds.

torch's own ``load_state_dict`` casts every state tensor to its parameter's dtype. A radius is float64 whatever the
parameter is, so the tensors are put back as they were saved once torch is done.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..formulas.options import find_base
from ..messages import describe, labelled
from .checks import count_layers
from .contents import check_complete, check_contents
from .layout import scalar_device
from .members import OUR_STATES

#: Every group of FusedLayca has all of these. Groups made by layer_groups for another optimizer have some.
OUR_OPTIONS = {"base", "rule", "rotate"}


def _pairs(optimizer: Optimizer, saved: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, Tensor, Any]]:
    """(saved group, label, parameter, saved state) of every parameter that has a saved state."""
    ids = chain.from_iterable(((group, key) for key in group["params"]) for group in saved["param_groups"])
    for (group, key), (_, label, param) in zip(ids, labelled(optimizer.param_groups), strict=False):
        if key in saved["state"]:
            yield group, label, param, saved["state"][key]


def is_foreign(saved: Mapping[str, Any]) -> bool:
    """Whether another optimizer wrote this checkpoint: none of its groups has the options that only ours have."""
    return not any(group.keys() >= OUR_OPTIONS for group in saved["param_groups"])


def adopt(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The state of a foreign checkpoint under the hyperparameters of ``optimizer``."""
    # Groups that do not match are torch's to refuse.
    groups = zip(optimizer.param_groups, saved["param_groups"], strict=False)
    adopted = [{**ours, "params": theirs["params"]} for ours, theirs in groups]
    return {**saved, "param_groups": adopted + saved["param_groups"][len(adopted) :]}


def check_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved state does not fit its parameter, or if no run can have left it."""
    for group, label, param, state in _pairs(optimizer, saved):
        if not isinstance(state, Mapping):
            raise ValueError(
                f"state_dict: the state of {describe(label, param)} is a {type(state).__name__}: it must be a dict of "
                "tensors"
            )
        base = find_base(group.get("base", optimizer.defaults.get("base")))
        check_complete(base.formula({**base.options, **group}), state, describe(label, param))
        for name, value in state.items():
            layers = count_layers(param, group.get("chunks", 1), label) if name == "radius" else 1
            check_contents(name, value, param, label, layers)
            if name not in OUR_STATES or not isinstance(value, Tensor):
                continue
            expected = {"radius": (layers,), "step": ()}.get(name, tuple(param.shape))
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"state_dict: {name!r} has shape {tuple(value.shape)}, but {describe(label, param)} needs "
                    f"{expected}: load it into an optimizer of the model that it was saved from"
                )


def _copied(name: str, value: Tensor, param: Tensor) -> Tensor:
    """A saved state tensor in a memory of its own, of its own type, on the device where its parameter needs it."""
    device = scalar_device(param.device) if name == "radius" else param.device
    return value.detach().to(device=device, copy=True)


def restore_types(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put every saved state tensor back as it was saved, copied to its parameter's device."""
    for _, _, param, state in _pairs(optimizer, saved):
        for name, value in state.items():
            if isinstance(value, Tensor):
                optimizer.state[param][name] = _copied(name, value, param)


class Loading:
    """A context in which torch's ``load_state_dict`` leaves every state tensor its type; ``check`` sees each group.

    Raises, before anything is modified, what ``check`` raises, and ValueError for shapes that do not fit.
    """

    def __init__(self, optimizer: Optimizer, check: Callable[[Mapping[str, Any]], None]) -> None:
        self._optimizer, self._check = optimizer, check
        self._saved: dict[str, Any] = {}
        #: Whether another optimizer wrote the checkpoint.
        self.is_foreign = False

    # Hooks registered by users may replace the dict, so ours looks at it after all of them.
    def _keep(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        self.is_foreign = is_foreign(saved)
        self._saved = adopt(optimizer, saved) if self.is_foreign else dict(saved)
        for group in self._saved["param_groups"]:
            self._check(group)
        check_state(optimizer, self._saved)
        return self._saved

    def _restore(self, optimizer: Optimizer) -> None:
        restore_types(optimizer, self._saved)

    def __enter__(self) -> "Loading":
        optimizer = self._optimizer
        self._hooks = (
            optimizer.register_load_state_dict_pre_hook(self._keep),
            optimizer.register_load_state_dict_post_hook(self._restore, prepend=True),
        )
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()


@dataclass(frozen=True)
class _Shielded:
    """A tensor inside something that torch does not know, and so passes through ``load_state_dict`` as it is."""

    tensor: Tensor


def check_radii(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise ValueError, for another optimizer than ours to load, for a saved radius that no run can have left."""
    for _, label, param, state in _pairs(optimizer, saved):
        if isinstance(state, Mapping):
            check_contents("radius", state.get("radius"), param, label, 1)


def shield_radii(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict ``saved`` with its radii shielded from torch's casts, for another optimizer than ours to load.

    Restoring them afterwards from ``saved`` would be wrong where a user's hook renumbers the parameters.
    """
    state = {
        key: {**each, "radius": _Shielded(each["radius"])}
        if isinstance(each, Mapping) and isinstance(each.get("radius"), Tensor)
        else each
        for key, each in saved["state"].items()
    }
    return {**saved, "state": state}


def unshield_radii(optimizer: Optimizer) -> None:
    """Take the shields of :func:`shield_radii` off the loaded state, in place."""
    for _, _, param in labelled(optimizer.param_groups):
        state = optimizer.state.get(param, {})
        if isinstance(state.get("radius"), _Shielded):
            state["radius"] = _copied("radius", state["radius"].tensor, param)


def keep_options(optimizer: Optimizer, saved: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The state_dict ``saved`` where groups without an option of these names have those of ``optimizer``.

    torch replaces groups as a whole: a checkpoint of the plain optimizer would make everything rotate that its groups
    exempt.
    """
    # Groups that do not match are torch's to refuse.
    pairs = zip(optimizer.param_groups, saved["param_groups"], strict=False)
    groups = [{**{name: ours[name] for name in names if name in ours}, **theirs} for ours, theirs in pairs]
    return {**saved, "param_groups": groups + saved["param_groups"][len(groups) :]}
