"""Loading a state_dict into another optimizer than ours, which ``attach`` turns, without changing the types of ours.

And of 16-bit parameters those of the whole state, which is that of float32 weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..formulas.chunks import as_tuples
from ..messages import describe, labelled
from .checks import check_memory, is_wrapper
from .compensation import HALVES
from .contents import check_contents
from .loading import copied, pairs, without_placeholders
from .others import option
from .radii import with_functions
from .regroup import follow_groups
from .same_layers import check_same_layers
from .structure import check_saved, mapped

#: What we keep in the state of another optimizer that we turn.
ATTACHED = ("radius", "remainder")


@dataclass(frozen=True)
class _Shielded:
    """A tensor inside something that torch does not know, and so passes through ``load_state_dict`` as it is."""

    tensor: Tensor


class _Kept(Tensor):
    """A tensor that torch's ``load_state_dict`` leaves as it is, and in which classes that look find their numbers."""

    def to(self, *args: Any, **options: Any) -> "_Kept":
        return self


def _shielded(name: str, value: Tensor) -> Any:
    if name in ATTACHED or is_wrapper(value):
        return _Shielded(value)
    return value.detach().as_subclass(_Kept)


def check_attached(
    optimizer: Optimizer, saved: Mapping[str, Any], before: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> None:
    """Raise ValueError, for another optimizer than ours to load, for saved states of ours that no run can have left.

    Or that is of another layer than those of the groups ``before``, which mean ``options`` where they say nothing.
    """
    ours = {
        param: {name: option(optimizer, group, name, options[name]) for name in ("rotate", "chunks")}
        for group in before
        for param in group["params"]
    }
    check_same_layers(pairs(optimizer, saved), ours.get, lambda theirs: option(optimizer, theirs, "chunks", None))
    for _, label, param, state in pairs(optimizer, saved):
        if not isinstance(state, Mapping):
            continue
        for name in ATTACHED:
            value = state.get(name)
            if isinstance(value, Tensor):
                check_memory(value, f"state_dict: the state {name!r} of {label}")
            check_contents(name, value, param, label, 1)
            if name == "remainder" and value is not None and value.shape != param.shape:
                raise ValueError(
                    f"state_dict: {name!r} has shape {tuple(value.shape)}, but {describe(label, param)} needs "
                    f"{tuple(param.shape)}: load it into an optimizer of the model that it was saved from"
                )


def follow_attached(optimizer: Optimizer, saved: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`follow_groups` for another optimizer than ours, whose groups may be replaced; what it should load.

    ``defaults``: the options of groups that say nothing.

    A checkpoint without radii is that of the plain optimizer, whose groups say nothing of what rotates.
    """
    check_saved(saved)
    saved = {**saved, "state": without_placeholders(saved["state"])}
    if any(isinstance(each, Mapping) and "radius" in each for each in saved["state"].values()):
        before = optimizer.param_groups
        groups, saved = follow_groups(optimizer, saved, defaults)
        saved = {**saved, "param_groups": with_functions(before, groups, saved["param_groups"])}
        optimizer.param_groups = groups
    return saved


def shield(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict ``saved`` with what keeps its type shielded from torch's casts, for another optimizer to load.

    Our keys, and where there are 16-bit parameters all states beside them, which are of float32 weights. Restoring them
    afterwards from ``saved`` would be wrong where a user's hook renumbers the parameters.
    """
    all_of_it = any(param.dtype in HALVES for _, _, param in labelled(optimizer.param_groups))

    def shielded(each: Any) -> Any:
        if not isinstance(each, Mapping) or not any(isinstance(each.get(name), Tensor) for name in ATTACHED):
            return each
        names = (each.keys() - {"step"}) if all_of_it else ATTACHED
        return {
            name: mapped(value, Tensor, partial(_shielded, name)) if name in names else value
            for name, value in each.items()
        }

    return {**saved, "state": {key: shielded(each) for key, each in saved["state"].items()}}


def unshield(optimizer: Optimizer) -> None:
    """Take the shields of :func:`shield` off the loaded state, in place, with torch's casts where ours do not hold."""
    for _, _, param in labelled(optimizer.param_groups):
        state = optimizer.state.get(param, {})
        for name, value in state.items():
            state[name] = mapped(value, (_Shielded, _Kept), partial(_unshielded, name, param))


def _unshielded(name: str, param: Tensor, shielded: _Shielded | _Kept) -> Tensor:
    value: Tensor = shielded.tensor if isinstance(shielded, _Shielded) else shielded.as_subclass(Tensor)
    if name in ATTACHED or param.dtype in HALVES:
        return copied(name, value, param)
    dtype = param.dtype if param.is_floating_point() else value.dtype
    return value.to(dtype=dtype, device=param.device)


def with_chunks(optimizer: Optimizer, saved: dict[str, Any], chunks: Any) -> dict[str, Any]:
    """The state_dict ``saved`` of another optimizer than ours with the chunks of groups that say nothing of them.

    They are what the radii in it belong to. :func:`without_chunks` takes them out again.
    """
    if chunks == 1 or "chunks" in optimizer.defaults:
        return saved
    return {**saved, "param_groups": [{"chunks": chunks, **group} for group in saved["param_groups"]]}


def without_chunks(saved: dict[str, Any], before: Sequence[Mapping[str, Any]], chunks: Any) -> dict[str, Any]:
    """The state_dict ``saved`` without what :func:`with_chunks` has put in, for an optimizer of groups ``before``."""
    if any("chunks" in group for group in before):
        return saved
    groups = [
        {name: value for name, value in group.items() if name != "chunks" or as_tuples(value) != chunks}
        for group in saved["param_groups"]
    ]
    return {**saved, "param_groups": groups}


def keep_options(optimizer: Optimizer, saved: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The state_dict ``saved`` where groups without an option of these names have those of ``optimizer``.

    torch replaces groups as a whole: a checkpoint of the plain optimizer would make everything rotate that its groups
    exempt.
    """
    # Groups that do not match are torch's to refuse.
    both = zip(optimizer.param_groups, saved["param_groups"], strict=False)
    groups = [{**{name: ours[name] for name in names if name in ours}, **theirs} for ours, theirs in both]
    return {**saved, "param_groups": groups + saved["param_groups"][len(groups) :]}
