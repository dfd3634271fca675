"""How a layer that is shared out over processes (a DTensor: FSDP2, tensor parallel) lies on this one.

Kernels see the local shard only, as a plain tensor. What they measure there is a part of the layer's dots, which
``distributed.py`` adds up; sums do not ask which elements a shard holds, so every kind of shard is alike. Where a
tensor holds several layers (``chunks``) as slices of the dimension that is shared out, shards that hold whole layers
need no sum, and others are cut into pieces, each a part of one layer.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from ..compat import first_row_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def is_sharded(tensor: Any) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor. The module, which takes a second to import, is there if one exists."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether it is a DTensor of a mesh that this process is no part of: the processes there step it by themselves."""
    return is_sharded(tensor) and tensor.device_mesh.get_coordinate() is None


def local_of(tensor: Tensor) -> Tensor:
    """The plain tensor of this process inside a DTensor, always the same object; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    local: Any = tensor._local_tensor
    # A gradient may still be on its way.
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def check_placements(tensor: Tensor, name: str) -> None:
    """Raise ValueError for a DTensor whose shards are still to be added up; ``name`` is what to call it."""
    if is_sharded(tensor) and any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{name} has placements {tensor.placements}: the numbers of a partial tensor are not there before a "
            "reduction. Redistribute it to Shard or Replicate first"
        )


def check_same_mesh(grad: Tensor, param: Tensor, name: str) -> None:
    """Raise TypeError or ValueError for a gradient, called ``name``, of other processes than its parameter."""
    if is_sharded(param) != is_sharded(grad):
        raise TypeError(f"{name} is a {type(grad).__name__}, its parameter a {type(param).__name__}: make them alike")
    if is_sharded(param) and is_sharded(grad):
        if grad.device_mesh != param.device_mesh:
            raise ValueError(
                f"{name} has device_mesh {grad.device_mesh}, its parameter {param.device_mesh}: redistribute the "
                "gradient to that of its parameter"
            )
        if grad.shape != param.shape:
            raise ValueError(f"{name} has shape {grad.shape}, its parameter {param.shape}: they must be the same")


def local_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """What this process needs of a gradient.

    Tensor parallel leaves some placed otherwise than their parameters: Replicate where an embedding is sharded, Partial
    where the activations of a norm layer are. All processes redistribute these together.
    """
    if is_sharded(grad) and is_sharded(param) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local_of(grad)


@dataclass(frozen=True)
class Piece:
    """Rows of a local tensor that hold ``layers`` layers, or a part of one: from ``first`` on among the tensor's."""

    first: int
    layers: int
    #: Of the local tensor; None: all of it.
    rows: slice | None = None
    #: Whether other processes hold more of it.
    is_part: bool = False

    def of(self, local: Tensor) -> Tensor:
        """The rows of a local tensor that make this piece: the tensor itself, or a view."""
        return local if self.rows is None else local[self.rows]

    def radii_of(self, radius: Tensor) -> Tensor:
        """Those of its layers among the tensor's: all of them, or a view."""
        return radius if len(radius) == self.layers else radius[self.first : self.first + self.layers]


@dataclass(frozen=True)
class Sharding:
    """One tensor's layers on this process.

    ``layers``: how many of them it knows, in whole or in part, ``pieces`` where they lie in the local tensor.
    ``groups``: the processes over which their dots are summed, one group per dimension of the mesh; none for a plain
    tensor, nor where every layer is whole.
    """

    layers: int
    pieces: tuple[Piece, ...]
    groups: "tuple[ProcessGroup, ...]" = ()
    #: Dimensions of the mesh over which whole layers are shared out, and with them their radii.
    whole: tuple[int, ...] = ()


def _cut(tensor: "DTensor", layers: int) -> tuple[Piece, ...]:
    """A piece for each layer, empty where this process has nothing of it."""
    rows, start, height = local_of(tensor).shape[0], first_row_of(tensor), tensor.shape[0] // layers
    # Where nothing is left for the last processes, torch's offsets may lie beyond the end.
    bounds = [min(max(layer * height - start, 0), rows) for layer in range(layers + 1)]
    return tuple(Piece(i, 1, slice(bounds[i], bounds[i + 1]), is_part=True) for i in range(layers))


def sharding_of(tensor: Tensor, layers: int, name: str, *, know_all: bool = False) -> Sharding:
    """How the ``layers`` equal slices of the first dimension of a parameter lie here.

    ``know_all``: also layers that other processes have as a whole are to be known here, as empty pieces.
    Raises ValueError, with ``name`` in the message, where the first dimension is shared out in turns (FSDP2 over tensor
    parallel) and holds several layers.
    """
    if not is_sharded(tensor):
        return Sharding(layers, (Piece(0, layers),))
    mesh = tensor.device_mesh
    cutting = [i for i, each in enumerate(tensor.placements) if not each.is_replicate() and mesh.size(i) > 1]
    on_rows = [i for i in cutting if tensor.placements[i].dim == 0] if layers > 1 else []  # type: ignore[attr-defined]
    if any(not tensor.placements[i].is_shard() for i in on_rows):
        raise ValueError(
            f"{name} holds {layers} layers (chunks) along its first dimension, which is shared out over two dimensions "
            f"of the mesh in turns ({tensor.placements}): no process holds a run of its rows. Use chunks=1, or shard "
            "another dimension"
        )
    parts = 1
    for dim in on_rows:
        parts *= mesh.size(dim)
    if on_rows and not know_all and (layers == tensor.shape[0] or layers % parts == 0):
        summed = [i for i in cutting if i not in on_rows]
        here = local_of(tensor).shape[0] * layers // tensor.shape[0]
        whole = [Piece(0, here, is_part=bool(summed))] if here else []
        return Sharding(here, tuple(whole), _groups(mesh, summed), tuple(on_rows))
    pieces = _cut(tensor, layers) if on_rows else (Piece(0, layers, is_part=bool(cutting)),)
    return Sharding(layers, pieces, _groups(mesh, cutting))


def _groups(mesh: "DeviceMesh", dims: Sequence[int]) -> "tuple[ProcessGroup, ...]":
    return tuple(mesh.get_group(dim) for dim in dims)


def wrap(local: Tensor, like: Tensor) -> Tensor:
    """A local tensor as a part of a state that is shared out as the parameter ``like``; itself for a plain one."""
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor

    shape, stride = like.shape, like.stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def radius_placements(param: "DTensor", sharding: Sharding) -> "list[Placement]":
    """How the radii of a parameter are shared out: as its first dimension where layers are whole, else not at all."""
    from torch.distributed.tensor import Replicate

    return [each if i in sharding.whole else Replicate() for i, each in enumerate(param.placements)]


def wrap_radius(local: Tensor, param: Tensor, sharding: Sharding, layers: int) -> Tensor:
    """The local radii as a part of those of all ``layers`` of a parameter; themselves for a plain one."""
    if not is_sharded(param):
        return local
    from torch.distributed.tensor import DTensor

    placements = radius_placements(param, sharding)
    shape = torch.Size((layers,))
    return DTensor.from_local(local, param.device_mesh, placements, run_check=False, shape=shape, stride=(1,))


def placed(value: Tensor, param: Tensor, placements: "Sequence[Placement] | None" = None) -> Tensor:
    """The local part of a state that may have been saved from other shards, or from none.

    ``placements``: how it should lie, None for as ``param`` does. All processes call this together where the state is a
    DTensor of another mesh or placement; a plain tensor is taken to be the whole, and the same everywhere.
    """
    if not is_sharded(param):
        return value.full_tensor() if is_sharded(value) else value
    from torch.distributed.tensor import distribute_tensor

    wanted = tuple(param.placements if placements is None else placements)
    if not is_sharded(value):
        value = distribute_tensor(value.to(local_of(param).device), param.device_mesh, wanted, src_data_rank=None)
    elif value.device_mesh != param.device_mesh:
        value = distribute_tensor(value.full_tensor(), param.device_mesh, wanted, src_data_rank=None)
    elif value.placements != wanted:
        value = value.redistribute(placements=wanted)
    return local_of(value)
