"""Loading a state_dict without changing the types of what it holds.

torch's own ``load_state_dict`` casts every state tensor to its parameter's dtype. A radius is float64 whatever the
parameter is, so the tensors are put back as they were saved once torch is done.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .bases import FORMULAS
from .batch import scalar_device
from .checks import count_layers, describe, labelled

#: State that the kernels read; whatever else a checkpoint holds is kept as it is.
OUR_STATES = {"radius", "step", *(name for formula in FORMULAS.values() for name in formula.states)}


def _pairs(optimizer: Optimizer, saved: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, Tensor, Any]]:
    """(saved group, label, parameter, saved state) of every parameter that has a saved state."""
    ids = chain.from_iterable(((group, key) for key in group["params"]) for group in saved["param_groups"])
    for (group, key), (_, label, param) in zip(ids, labelled(optimizer.param_groups), strict=False):
        if key in saved["state"]:
            yield group, label, param, saved["state"][key]


def is_foreign(saved: Mapping[str, Any]) -> bool:
    """Whether another optimizer wrote this checkpoint: none of its groups has an option that only ours has."""
    return all("rotate" not in group for group in saved["param_groups"])


def adopt(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The state of a foreign checkpoint under the hyperparameters of ``optimizer``."""
    # Groups that do not match are torch's to refuse.
    groups = zip(optimizer.param_groups, saved["param_groups"], strict=False)
    adopted = [{**ours, "params": theirs["params"]} for ours, theirs in groups]
    return {**saved, "param_groups": adopted + saved["param_groups"][len(adopted) :]}


def check_shapes(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved state tensor does not fit its parameter."""
    for group, label, param, state in _pairs(optimizer, saved):
        for name, value in state.items():
            if name not in OUR_STATES or not isinstance(value, Tensor):
                continue
            expected = tuple(param.shape)
            if name == "radius":
                expected = (count_layers(param, group.get("chunks", 1), label),)
            elif name == "step":
                expected = ()
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"state_dict: {name!r} has shape {tuple(value.shape)}, but {describe(label, param)} needs "
                    f"{expected}: load it into an optimizer of the model that it was saved from"
                )


def restore_types(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put every saved state tensor back as it was saved, copied to its parameter's device."""
    for _, _, param, state in _pairs(optimizer, saved):
        device = scalar_device(param.device)
        for name, value in state.items():
            if isinstance(value, Tensor):
                target = device if name == "radius" else param.device
                optimizer.state[param][name] = value.detach().to(device=target, copy=True)
