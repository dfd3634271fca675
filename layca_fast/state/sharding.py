"""How a layer that is shared out over processes (a DTensor: FSDP2, tensor parallel) lies on this one.

Kernels see the local shard only, as a plain tensor. What they measure there is a part of the layer's dots, which
``distributed.py`` adds up; sums do not ask which elements a shard holds, so every kind of shard is alike. Where a
tensor holds several layers (``chunks``) along a dimension that is shared out, shards that hold whole layers need no
sum, and others are cut into pieces. So are plain tensors whose layers are of several sizes: a piece for each.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from ..compat import local_tensor, shard_offsets
from .cut import Cut

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
    local: Any = local_tensor(tensor)
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


#: Of a piece that nothing of lies here.
_NOTHING = (slice(0, 0),)


@dataclass(frozen=True)
class Piece:
    """What a local tensor has of ``layers`` layers, all or a part of each, from number ``first`` of those here on."""

    first: int
    layers: int
    #: Into the local tensor, its first two dimensions swapped if it is ``turned``; None: all of it.
    index: tuple[int | slice, ...] | None = None
    #: Whether other processes hold more of it.
    is_part: bool = False
    turned: bool = False

    @property
    def is_view(self) -> bool:
        """Whether it is another tensor than the local one."""
        return self.turned or self.index is not None

    def of(self, local: Tensor) -> Tensor:
        """What is this piece of a local tensor: the tensor itself, or a view."""
        local = local.transpose(0, 1) if self.turned else local
        return local if self.index is None else local[self.index]

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
    #: The number among all layers of the first that this process knows.
    start: int = 0


def _ranges(tensor: "DTensor", cut: Cut) -> list[tuple[int, int]]:
    """First index and end of what this process has of each dimension of ``cut.shape``."""
    offsets = shard_offsets(tensor)
    local = cut.walked(local_of(tensor)).shape
    # Where nothing is left for the last processes, torch's offsets may lie beyond the end.
    starts = [min(int(offsets[cut.dim_of(dim)]), size) for dim, size in enumerate(cut.shape)]
    return [(start, start + size) for start, size in zip(starts, local, strict=True)]


def _indices(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return product(*map(range, sizes))


def _each_layer(cut: Cut, ranges: Sequence[tuple[int, int]], is_part: bool) -> Iterator[Piece]:
    """A piece for each layer, empty where this process has nothing of it."""
    start, end = ranges[cut.stack]
    first = 0
    for lead in _indices(cut.shape[: cut.stack]):
        places = list(zip(lead, ranges, strict=False))
        at = tuple(index - begin for index, (begin, _) in places)
        is_here = all(begin <= index < stop for index, (begin, stop) in places)
        for part in range(cut.parts):
            low, high = (min(max(bound, start), end) - start for bound in cut.bounds[part : part + 2])
            yield Piece(first, 1, (*at, slice(low, high)) if is_here else _NOTHING, is_part, cut.turned)
            first += 1


def _runs_of_layers(cut: Cut, ranges: Sequence[tuple[int, int]], is_part: bool) -> Iterator[Piece]:
    """A piece for each run of layers that this process has, or has not, along the last dimension that cuts the runs."""
    shared = [dim for dim in range(cut.stack) if ranges[dim] != (0, cut.shape[dim])]
    if not shared:
        yield Piece(0, cut.layers, None, is_part, cut.turned)
        return
    dim = shared[-1]
    size, (start, end) = cut.shape[dim], ranges[dim]
    each, first = prod(cut.shape[dim + 1 : cut.stack]) * cut.parts, 0
    for lead in _indices(cut.shape[:dim]):
        places = list(zip(lead, ranges, strict=False))
        is_here = all(begin <= index < stop for index, (begin, stop) in places)
        low, high = (start, end) if is_here else (0, 0)
        here: tuple[int | slice, ...] = (*(index - begin for index, (begin, _) in places), slice(None))
        for count, index in ((low, _NOTHING), (high - low, here), (size - high, _NOTHING)):
            if count:
                yield Piece(first, count * each, index, is_part, cut.turned)
            first += count * each


def _pieces(cut: Cut, ranges: Sequence[tuple[int, int]], is_part: bool) -> tuple[Piece, ...]:
    """The pieces of a local tensor that lies in ``ranges`` of each dimension."""
    cuts_layers = cut.parts > 1 and ranges[cut.stack] != (0, cut.shape[cut.stack])
    by_layer = cuts_layers or not cut.is_even
    return tuple((_each_layer if by_layer else _runs_of_layers)(cut, ranges, is_part))


def sharding_of(tensor: Tensor, cut: Cut, name: str, *, know_all: bool = False) -> Sharding:
    """How the layers that ``cut`` makes of a parameter lie here.

    ``know_all``: also layers that other processes have as a whole are to be known here, as empty pieces.
    Raises ValueError, with ``name`` in the message, where a dimension is shared out in turns (FSDP2 over tensor
    parallel) and holds several layers.
    """
    layers, everything = cut.layers, [(0, size) for size in cut.shape]
    if not is_sharded(tensor):
        return Sharding(layers, _pieces(cut, everything, is_part=False))
    mesh = tensor.device_mesh
    cutting = [i for i, each in enumerate(tensor.placements) if not each.is_replicate() and mesh.size(i) > 1]
    dim_of = {i: cut.dim_of(tensor.placements[i].dim) for i in cutting}  # type: ignore[attr-defined]
    between = [i for i in cutting if dim_of[i] < cut.stack + (cut.parts > 1)] if layers > 1 else []
    if any(not tensor.placements[i].is_shard() for i in between):
        raise ValueError(
            f"{name} holds {layers} layers (chunks) along a dimension that is shared out over two dimensions of the "
            f"mesh in turns ({tensor.placements}): no process holds a run of them. Use chunks=1, or shard "
            "another dimension"
        )
    if between and not know_all and _are_whole(cut, [dim_of[i] for i in between], prod(map(mesh.size, between))):
        summed = [i for i in cutting if i not in between]
        here = cut.walked(local_of(tensor)).shape[0] * layers // cut.shape[0]
        start = _ranges(tensor, cut)[0][0] * layers // cut.shape[0]
        whole = [Piece(0, here, None, bool(summed), cut.turned)] if here else []
        return Sharding(here, tuple(whole), _groups(mesh, summed), tuple(between), start)
    ranges = _ranges(tensor, cut) if between else everything
    return Sharding(layers, _pieces(cut, ranges, is_part=bool(cutting)), _groups(mesh, cutting))


def _are_whole(cut: Cut, dims: Sequence[int], processes: int) -> bool:
    """Whether shards of these dimensions, by so many processes, are runs of whole layers as torch would cut radii."""
    if any(dim != 0 for dim in dims) or not cut.is_even:
        return False
    if cut.stack == 0:
        return cut.layers % processes == 0
    return cut.layers == cut.shape[0] or cut.shape[0] % processes == 0


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
    """How the radii of a parameter are shared out: as what holds its layers where these are whole, else not at all."""
    from torch.distributed.tensor import Replicate, Shard

    return [Shard(0) if i in sharding.whole else Replicate() for i in range(param.device_mesh.ndim)]


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
