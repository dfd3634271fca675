"""Layers whose weights are all zero: they have no direction to turn."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..messages import describe
from .checks import is_wrapper
from .cut import Cut
from .sharding import Sharding, is_elsewhere, is_sharded, local_of, sharding_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def have_zero_layers(tensors: Sequence[tuple[Tensor, Cut]]) -> list[bool]:
    """Whether each tensor, given with how it is cut into layers, holds one whose weights are all zero.

    Waits once for each device. Of DTensors all processes ask together, and agree. Tensors without plain numbers (empty,
    meta, sparse, wrappers) are not looked into: what the optimizer cannot take, it refuses itself.
    """
    flags = [False] * len(tensors)
    found: dict[torch.device, dict[int, Tensor]] = {}
    shared = []
    for index, (tensor, cut) in enumerate(tensors):
        local = local_of(tensor)
        if local.layout != torch.strided or local.is_meta or is_wrapper(local) or is_elsewhere(tensor):
            continue
        if is_sharded(tensor):
            sharding = sharding_of(tensor, cut, f"a parameter of shape {tuple(tensor.shape)}")
            shared.append((index, tensor, sharding, _zero_layers(local, sharding)))
        elif tensor.numel() > 0:
            zero = _zero_layers(local, sharding_of(tensor, cut, ""))
            found.setdefault(tensor.device, {})[index] = zero.any()
    for index, value in _agreed(shared):
        found.setdefault(value.device, {})[index] = value
    for on_device in found.values():
        for index, is_zero in zip(on_device, torch.stack(list(on_device.values())).tolist(), strict=True):
            flags[index] = is_zero
    return flags


def _are_zero(tensor: Tensor, layers: int) -> Tensor:
    # The norm needs no memory for the absolute values.
    largest: Tensor = torch.linalg.vector_norm(tensor.detach().reshape(layers, -1), torch.inf, dim=1)
    return largest == 0


def _zero_layers(local: Tensor, sharding: Sharding) -> Tensor:
    """Of each layer that this process knows, whether what it has of it is all zero: (layers,) float64, 1 or 0."""
    zero = torch.ones(sharding.layers, dtype=torch.float64, device=local.device)
    for piece in sharding.pieces:
        part = piece.of(local)
        if part.numel() > 0:
            zero[piece.first : piece.first + piece.layers] = _are_zero(part, piece.layers).double()
    return zero


def _agreed(shared: "Sequence[tuple[int, Tensor, Sharding, Tensor]]") -> list[tuple[int, Tensor]]:
    """For each (index, DTensor, its sharding, zero layers here): whether it has one anywhere, 0-d, by its index.

    A layer is zero where all its parts are; a tensor has a zero layer where any process that has whole ones finds one.
    """
    from .reduction import reduce_together

    reduce_together([(zero, sharding.groups) for _, _, sharding, zero in shared], "min")
    anywhere = []
    for _, tensor, sharding, zero in shared:
        whole: tuple[ProcessGroup, ...] = ()
        if is_sharded(tensor):
            whole = tuple(tensor.device_mesh.get_group(dim) for dim in sharding.whole)
        anywhere.append((zero.amax(0, keepdim=True) if len(zero) else zero.new_zeros(1), whole))
    reduce_together(anywhere, "max")
    # An empty tensor has no weights that could be zero.
    return [
        (index, (flag > 0).squeeze() & (tensor.numel() > 0))
        for (index, tensor, _, _), (flag, _) in zip(shared, anywhere, strict=True)
    ]


class Layers(NamedTuple):
    """A tensor that is to rotate: what is asked of its weights before they turn."""

    group: Mapping[str, Any]
    label: str
    param: Tensor
    cut: Cut

    @property
    def is_at_rest(self) -> bool:
        """Whether the host can see that a step at the group's rate moves nothing."""
        lr = self.group["lr"]
        return (not isinstance(lr, Tensor) or lr.device.type == "cpu") and float(lr) <= 0.0


def check_norms(tensors: Sequence[Layers]) -> list[Layers]:
    """Raise ValueError if a layer's weights are all zero: it has no direction to turn. Waits for the device.

    Returns those of which that is so and that do not move yet: checkpoints have an optimizer make its state at lr = 0,
    by weights that they load only then.
    """
    flags = have_zero_layers([(each.param, each.cut) for each in tensors])
    zero = [each for each, flag in zip(tensors, flags, strict=True) if flag]
    if not all(each.is_at_rest for each in zero):
        names = ", ".join(describe(each.label, each.param) for each in zero)
        raise ValueError(
            f"all weights of a layer are zero in {names}: such a layer has no direction to turn. Put these parameters "
            "in a group with rotate=False, or with joins_at, the norm from which on they rotate, or initialize them"
        )
    return zero
