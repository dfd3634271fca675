"""Loading a state_dict without changing the types of what it holds.

torch's own ``load_state_dict`` casts every state tensor to its parameter's dtype. A radius is float64 whatever the
parameter is, so the tensors are put back as they were saved once torch is done.
"""

import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .batch import scalar_device
from .checks import count_layers, describe, labelled


def _pairs(optimizer: Optimizer, saved: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, Tensor, Any]]:
    """(saved group, label, parameter, saved state) of every parameter that has a saved state."""
    ids = chain.from_iterable(((group, key) for key in group["params"]) for group in saved["param_groups"])
    for (group, key), (_, label, param) in zip(ids, labelled(optimizer.param_groups), strict=False):
        if key in saved["state"]:
            yield group, label, param, saved["state"][key]


def adopt(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """``saved``, or where another optimizer wrote it: its state under the hyperparameters of ``optimizer``."""
    ours, theirs = optimizer.param_groups, saved["param_groups"]
    if len(ours) != len(theirs) or all("rotate" in group for group in theirs):
        return saved
    warnings.warn(
        "state_dict: another optimizer wrote this checkpoint. Its state is taken over; hyperparameters stay as they "
        "are, and radii are taken from the weights at the next step",
        stacklevel=6,
    )
    groups = [{**own, "params": other["params"]} for own, other in zip(ours, theirs, strict=True)]
    return {**saved, "param_groups": groups}


def check_shapes(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved state tensor does not fit its parameter."""
    for group, label, param, state in _pairs(optimizer, saved):
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            layers = count_layers(param, group.get("chunks", 1), label) if name == "radius" else 0
            expected = (layers,) if name == "radius" else tuple(param.shape)
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
