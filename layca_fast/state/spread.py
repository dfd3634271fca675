"""Which elements of a tensor's layers lie on which of the processes that share them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import torch

from ..compat import split_factor
from .cut import Cut
from .reduction import Groups
from .sharding import Sharding, is_sharded, local_of

#: Runs of rows, or of what another dimension counts: (first, how many) among all.
Runs = tuple[tuple[int, int], ...]

#: A process among those that share a tensor: its place along each dimension of the mesh that shards it.
At = tuple[int, ...]


def _chunk(size: int, parts: int, part: int) -> tuple[int, int]:
    """Begin and end of a part, as torch.chunk has them: the last ones may be short, or empty."""
    each = -(-size // parts)
    return min(part * each, size), min((part + 1) * each, size)


def _between(runs: Runs, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """What lies from ``begin`` to ``end`` among the elements that ``runs`` count."""
    passed = 0
    for first, count in runs:
        start, stop = max(begin - passed, 0), min(end - passed, count)
        if start < stop:
            yield first + start, stop - start
        passed += count


@lru_cache(maxsize=4096)
def _runs(size: int, cuts: tuple[tuple[int, int], ...], at: At) -> Runs:
    """What is left of ``size`` rows where each of ``cuts`` (split factor, parts) leaves the part that ``at`` names.

    Shard takes one run. _StridedShard, which has a split factor, takes one of each of so many.
    """
    runs: Runs = ((0, size),)
    for (factor, parts), part in zip(cuts, at, strict=True):
        here = sum(count for _, count in runs)
        found: list[tuple[int, int]] = []
        for each in range(factor):
            begin, end = _chunk(here, factor, each)
            first, last = _chunk(end - begin, parts, part)
            found += _between(runs, begin + first, begin + last)
        runs = tuple(found)
    return runs


@dataclass(frozen=True)
class Spread:
    """How the matrices of a tensor lie over the processes of ``groups``, one group per dimension of the mesh.

    ``cut``: those that this process knows a part of. ``sizes``: how many processes each group has, ``here`` this one's
    place. ``places``: the place of each rank of each group.
    """

    groups: Groups
    sizes: At
    here: At
    places: tuple[At, ...]
    cut: Cut
    #: For each dimension of the tensor: which groups cut it, in order, and how.
    _cuts: tuple[tuple[tuple[int, int, int], ...], ...]

    @property
    def numel(self) -> int:
        """How many elements all layers have that this process knows a part of."""
        return prod(self.cut.shape)

    @property
    def largest(self) -> int:
        """How many elements the largest matrix has."""
        return max((prod(self.matrix(part)) for part in range(self.cut.parts)), default=0)

    def shape(self, layer: int) -> tuple[int, ...]:
        """The shape of a layer among the dimensions of the tensor."""
        return tuple(end - begin for begin, end in self.cut.box(layer))

    def matrix(self, layer: int) -> tuple[int, ...]:
        """The shape of the matrix that a layer is."""
        return self.cut.layer_shape(layer)

    def sides(self, layer: int) -> tuple[int, int]:
        """Rows and columns of a matrix."""
        rows, *others = self.matrix(layer)
        return rows, prod(others)

    def part(self, layer: int, at: At) -> tuple[Runs, ...]:
        """What the process at ``at`` has of a layer: for each dimension the runs of it, counted within the layer."""
        found = []
        for dim, (begin, end) in enumerate(self.cut.box(layer)):
            runs = [(max(first, begin), min(first + count, end)) for first, count in self.runs(dim, at)]
            found.append(tuple((first - begin, last - first) for first, last in runs if first < last))
        return tuple(found)

    def runs(self, dim: int, at: At) -> Runs:
        """What the process at ``at`` has of a dimension of the tensor."""
        kinds = tuple((factor, parts) for _, factor, parts in self._cuts[dim])
        return _runs(self.cut.shape[dim], kinds, tuple(at[i] for i, _, _ in self._cuts[dim]))

    def shape_at(self, layer: int, at: At) -> tuple[int, ...]:
        """The shape of that."""
        return tuple(sum(count for _, count in runs) for runs in self.part(layer, at))

    def boxes(self, layer: int, at: At) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Where each dense box of that lies in the process's part, and where in the layer."""
        dims = []
        for runs in self.part(layer, at):
            passed, pairs = 0, []
            for first, count in runs:
                pairs.append((slice(passed, passed + count), slice(first, first + count)))
                passed += count
            dims.append(pairs)
        for box in product(*dims):
            yield tuple(part for part, _ in box), tuple(whole for _, whole in box)


def spread_of(param: Any, sharding: Sharding, cut: Cut, name: str) -> Spread:
    """How the matrices of ``param``, a DTensor of which others have parts, lie over those that share them.

    Raises ValueError where this process has another part than its placements say, as ``DTensor.from_local`` allows.
    """
    assert is_sharded(param)
    mesh, placements = param.device_mesh, param.placements
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    cutting = (i for i, each in enumerate(placements) if not each.is_replicate() and mesh.size(i) > 1)
    dims = [i for i in cutting if i not in sharding.whole]
    local = tuple(cut.walked(local_of(param)).shape)
    if sharding.whole:
        cut = cut.within(local[0])
    cuts: list[list[tuple[int, int, int]]] = [[] for _ in param.shape]
    for axis, dim in enumerate(dims):
        placement: Any = placements[dim]
        cuts[cut.dim_of(placement.dim)].append((axis, split_factor(placement), mesh.size(dim)))
    spread = Spread(
        groups=sharding.groups,
        sizes=tuple(mesh.size(dim) for dim in dims),
        here=tuple(coordinate[dim] for dim in dims),
        places=tuple(_places(mesh, dim, coordinate) for dim in dims),
        cut=cut,
        _cuts=tuple(map(tuple, cuts)),
    )
    runs = (spread.runs(dim, spread.here) for dim in range(param.dim()))
    if tuple(sum(count for _, count in each) for each in runs) != local:
        raise ValueError(
            f"{name} has a shard of shape {tuple(local_of(param).shape)} on this process, which is not what its "
            f"placements {placements} make of {tuple(param.shape)}: where the whole matrix is needed, shards must lie "
            "as distribute_tensor cuts them"
        )
    return spread


def _places(mesh: Any, dim: int, coordinate: Sequence[int]) -> At:
    """The place along ``dim`` of each rank of its group: groups are sorted, meshes need not be."""
    row = mesh.mesh[tuple(slice(None) if i == dim else place for i, place in enumerate(coordinate))].tolist()
    return tuple(row.index(rank) for rank in torch.distributed.get_process_group_ranks(mesh.get_group(dim)))
