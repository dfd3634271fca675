"""Loading a state_dict without changing the types of what it holds.

torch's own ``load_state_dict`` casts every state tensor to its parameter's dtype. A radius is float64 whatever the
parameter is, so the tensors are put back as they were saved once torch is done.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..formulas.options import find_base
from ..messages import describe, labelled
from .checks import check_memory
from .contents import check_complete, check_contents
from .cut import cut_of
from .entries import drop_empty
from .layout import scalar_device
from .members import OUR_STATES
from .others import OUR_OPTIONS
from .radii import with_functions
from .regroup import follow_groups
from .same_layers import check_same_layers
from .structure import check_saved


def pairs(optimizer: Optimizer, saved: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, Tensor, Any]]:
    """(saved group, label, parameter, saved state) of every parameter that has a saved state."""
    ids = chain.from_iterable(((group, key) for key in group["params"]) for group in saved["param_groups"])
    for (group, key), (_, label, param) in zip(ids, labelled(optimizer.param_groups), strict=False):
        if key in saved["state"]:
            yield group, label, param, saved["state"][key]


def is_foreign(saved: Mapping[str, Any]) -> bool:
    """Whether another optimizer wrote this checkpoint: none of its groups has the options that only ours have."""
    return not any(group.keys() >= OUR_OPTIONS for group in saved["param_groups"])


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """What the groups call their parameters, in order; None where one has no name."""
    if any(len(group.get("param_names") or ()) != len(group["params"]) for group in groups):
        return None
    return [name for group in groups for name in group["param_names"]]


def _matched(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A foreign checkpoint with its parameters in our groups, by name where both have names.

    Raises ValueError where names are missing, there or altogether, and groups differ in number or size.
    """
    groups, theirs = optimizer.param_groups, saved["param_groups"]
    sizes, saved_sizes = ([len(group["params"]) for group in each] for each in (groups, theirs))
    ours, known = _names(groups), _names(theirs)
    if ours is None or known is None:
        if sizes == saved_sizes:
            return saved
        raise ValueError(
            f"state_dict: another optimizer wrote this checkpoint, with groups of {saved_sizes} parameters where this "
            f"one has {sizes}. Names would tell which is which: make this optimizer of layer_groups(model) or "
            "model.named_parameters(), and name those of the checkpoint, in their order: "
            "saved['param_groups'][0]['param_names'] = [name for name, _ in model.named_parameters()]"
        )
    keys = dict(zip(known, chain.from_iterable(group["params"] for group in theirs), strict=True))
    missing = [name for name in ours if name not in keys]
    if missing:
        raise ValueError(
            f"state_dict: another optimizer wrote this checkpoint, and it has no parameters {missing}: load it into an "
            "optimizer of the model that it was saved from"
        )
    matched = [{"params": [keys[name] for name in group["param_names"]]} for group in groups]
    used = {keys[name] for name in ours}
    # That of parameters which are not trained here would be kept under their numbers.
    state = {key: value for key, value in saved["state"].items() if key in used}
    return {**saved, "state": state, "param_groups": matched}


def adopt(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The state of a foreign checkpoint under the hyperparameters of ``optimizer``."""
    saved = _matched(optimizer, saved)
    groups = zip(optimizer.param_groups, saved["param_groups"], strict=False)
    adopted = [{**ours, "params": theirs["params"]} for ours, theirs in groups]
    return {**saved, "param_groups": adopted + saved["param_groups"][len(adopted) :]}


def check_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved state does not fit its parameter, or if no run can have left it."""
    for group, label, param, state in pairs(optimizer, saved):
        if not isinstance(state, Mapping):
            raise ValueError(
                f"state_dict: the state of {describe(label, param)} is a {type(state).__name__}: it must be a dict of "
                "tensors"
            )
        base = find_base(group.get("base", optimizer.defaults.get("base")))
        check_complete(base.formula({**base.options, **group}), state, describe(label, param))
        for name, value in state.items():
            is_ours = name in OUR_STATES and isinstance(value, Tensor)
            if is_ours:
                check_memory(value, f"state_dict: the state {name!r} of {label}")
            cut = cut_of(param, group.get("chunks", 1), label) if name == "radius" else None
            # Of unequal layers one may be as large as all.
            equal = cut.layers if cut is not None and cut.is_even else 1
            check_contents(name, value, param, label, equal)
            if not is_ours:
                continue
            expected = {"radius": (1 if cut is None else cut.layers,), "step": ()}.get(name, tuple(param.shape))
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"state_dict: {name!r} has shape {tuple(value.shape)}, but {describe(label, param)} needs "
                    f"{expected}: load it into an optimizer of the model that it was saved from"
                )


def without_placeholders(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A saved state without the empty dicts that torch.distributed.checkpoint puts where a flat one has nothing."""

    def is_there(name: str, value: Any) -> bool:
        return name not in OUR_STATES or not isinstance(value, dict) or bool(value)

    return {
        key: {name: value for name, value in each.items() if is_there(name, value)}
        if isinstance(each, Mapping)
        else each
        for key, each in state.items()
    }


def copied(name: str, value: Tensor, param: Tensor) -> Tensor:
    """A saved state tensor in a memory of its own, of its own type, on the device where its parameter needs it."""
    device = scalar_device(param.device) if name == "radius" else param.device
    return value.detach().to(device=device, copy=True)


def restore_types(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put every saved state tensor back as it was saved, copied to its parameter's device."""
    for _, _, param, state in pairs(optimizer, saved):
        for name, value in state.items():
            if isinstance(value, Tensor):
                optimizer.state[param][name] = copied(name, value, param)


class Loading:
    """A context in which torch's ``load_state_dict`` leaves every state tensor its type; ``check`` sees each group.

    Raises, before anything is modified, what ``check`` raises, and ValueError for shapes that do not fit.
    """

    def __init__(self, optimizer: Optimizer, check: Callable[[Mapping[str, Any]], None]) -> None:
        self._optimizer, self._check = optimizer, check
        self._saved: dict[str, Any] = {}
        self._before = self._groups = optimizer.param_groups
        #: Whether another optimizer wrote the checkpoint.
        self.is_foreign = False

    # Hooks registered by users may replace the dict, so ours looks at it after all of them.
    def _keep(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        check_saved(saved)
        self.is_foreign = is_foreign(saved)
        saved = {**saved, "state": without_placeholders(saved["state"])}
        self._before = optimizer.param_groups
        if self.is_foreign:
            self._groups, self._saved = self._before, adopt(optimizer, saved)
        else:
            self._groups, self._saved = follow_groups(optimizer, saved)
        saved_groups = with_functions(self._before, self._groups, self._saved["param_groups"])
        self._saved = {**self._saved, "param_groups": saved_groups}
        for group in saved_groups:
            self._check(group)
        # torch takes the parameters of each group from here.
        optimizer.param_groups = self._groups
        check_state(optimizer, self._saved)
        ours = {param: group for group in self._before for param in group["params"]}
        check_same_layers(pairs(optimizer, self._saved), ours.get, lambda theirs: theirs.get("chunks"))
        return self._saved

    def _restore(self, optimizer: Optimizer) -> None:
        restore_types(optimizer, self._saved)
        drop_empty(optimizer.state)

    def __enter__(self) -> "Loading":
        optimizer = self._optimizer
        self._hooks = (
            optimizer.register_load_state_dict_pre_hook(self._keep),
            optimizer.register_load_state_dict_post_hook(self._restore, prepend=True),
        )
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None and self._optimizer.param_groups is self._groups:
            self._optimizer.param_groups = self._before
        for hook in self._hooks:
            hook.remove()
