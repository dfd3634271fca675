"""Matrices that lie on several processes: each travels to one of them, which makes its direction, and comes back.

Along each dimension of the mesh all parts travel packed, in one all-to-all there and one back. Who sends what follows
from the param groups alone, so all processes agree on it, and send zeros where they have no gradient. What is sent is
of the narrower of two types, that of the steps and that in which directions are made: nothing is rounded that would
not be rounded otherwise.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, product
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formulas.direction import Direction
from ..state.cut import by_layer
from ..state.reduction import Groups, home_of
from ..state.spread import At, Spread
from .directions import Directed, stack_limit
from .scratch import Scratch
from .stacks import Run, Stack, stacks_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def wire_of(batch_type: torch.dtype, direction: Direction) -> torch.dtype:
    """The type that steps of ``batch_type`` and their directions travel in."""
    return min(batch_type, direction.dtype, key=lambda dtype: dtype.itemsize)


def work(rows: int, columns: int) -> int:
    """What the products of a matrix take, in proportion: the square of the smaller side, times the larger."""
    return min(rows, columns) * rows * columns


def owners(works: Sequence[int], sizes: At) -> list[At]:
    """Which of so many processes makes the direction of each matrix: the most work first, to the idlest.

    ``works``: of each matrix, ``sizes``: of the mesh that all of them share.
    """
    # As a heap the idlest is found at once.
    idlest = [(0, at) for at in product(*map(range, sizes))]
    found: dict[int, At] = {}
    for i in sorted(range(len(works)), key=lambda i: -works[i]):
        load, at = heapq.heappop(idlest)
        found[i] = at
        heapq.heappush(idlest, (load + works[i], at))
    return [found[i] for i in range(len(works))]


@dataclass
class Traveller:
    """One matrix: layer ``layer`` of those of a tensor that this process has a part of, ``steps``, which may be empty.

    ``parts``: those of it that are on this process, by whose they are, while hops are being planned.
    """

    spread: Spread
    layer: int
    steps: Tensor
    batch: Directed
    #: The group of options that says what its direction is.
    group: int
    owner: At = ()
    parts: list[tuple[At, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shape, self.sides = self.spread.shape(self.layer), self.spread.sides(self.layer)

    def numel(self, at: At) -> int:
        """The number of elements of a part."""
        return prod(self.spread.shape_at(self.layer, at))


class _Hop:
    """One all-to-all along ``group``, and the same way back. Planning it moves the parts of ``travellers``."""

    def __init__(
        self,
        number: int,
        group: "ProcessGroup",
        travellers: Sequence[Traveller],
        scratch: Scratch,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._group = group
        on_board = [(each, each.spread.groups.index(group)) for each in travellers if group in each.spread.groups]
        leaving: list[list[Tensor]] = []
        coming: list[list[tuple[Traveller, At]]] = []
        for rank in range(group.size()):
            leaving.append([])
            coming.append([])
            for each, axis in on_board:
                place = each.spread.places[axis][rank]
                if place == each.owner[axis]:
                    leaving[-1] += [part for _, part in each.parts]
                if each.spread.here[axis] == each.owner[axis]:
                    coming[-1] += [(each, (*at[:axis], place, *at[axis + 1 :])) for at, _ in each.parts]
        self._given = [sum(part.numel() for part in parts) for parts in leaving]
        self._taken = [sum(each.numel(at) for each, at in parts) for parts in coming]
        self._out = scratch.take(f"given {number}", sum(self._given), dtype, device)
        self._in = scratch.take(f"taken {number}", sum(self._taken), dtype, device)
        self._parts = [part for parts in leaving for part in parts if part.numel() > 0]
        firsts = accumulate((part.numel() for part in self._parts), initial=0)
        pairs = zip(firsts, self._parts, strict=False)
        self._packed = [self._out[first : first + part.numel()].view(part.shape) for first, part in pairs]
        for each, _ in on_board:
            each.parts = []
        arrived = [(each, at, each.numel(at)) for parts in coming for each, at in parts]
        firsts = accumulate((count for _, _, count in arrived), initial=0)
        for first, (each, at, count) in zip(firsts, arrived, strict=False):
            each.parts.append((at, self._in[first : first + count]))
        for each, _ in on_board:
            # As who is to take them next expects them.
            each.parts.sort(key=lambda pair: pair[0])

    def go(self) -> None:
        """Bring the parts to where they are due."""
        _copy(self._packed, self._parts)
        torch.distributed.all_to_all_single(self._in, self._out, self._taken, self._given, self._group)

    def come_back(self) -> None:
        """Bring back what lies where the parts came to."""
        torch.distributed.all_to_all_single(self._out, self._in, self._given, self._taken, self._group)
        _copy(self._parts, self._packed)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _ways(spreads: Iterable[Spread]) -> list["ProcessGroup"]:
    """The groups that matrices travel along, in an order that all who share some of them agree on."""
    by_length = sorted(dict.fromkeys(spread.groups for spread in spreads), key=len, reverse=True)
    found = dict.fromkeys(group for groups in by_length for group in groups)
    # Along the innermost dimension first, whose processes are nearest.
    return list(reversed(found))


class Exchange:
    """The directions of ``travellers``, which are in the order of the param groups, and travel as ``dtype``.

    :meth:`run` replaces their steps by them, with all processes that share any. ``device``: where they are made.
    """

    def __init__(
        self, travellers: Sequence[Traveller], scratch: Scratch, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype, self._scratch, self._device = dtype, scratch, device
        self._all = list(travellers)
        domains: dict[Groups, list[Traveller]] = {}
        for each in self._all:
            domains.setdefault(each.spread.groups, []).append(each)
        for together in domains.values():
            works = [work(*each.sides) for each in together]
            for each, owner in zip(together, owners(works, together[0].spread.sizes), strict=True):
                each.owner = owner
        for each in self._all:
            each.parts = [(each.spread.here, each.steps)]
        ways = _ways(each.spread for each in self._all)
        self._hops = [_Hop(i, way, self._all, scratch, dtype, device) for i, way in enumerate(ways)]
        #: Those whose directions are made here.
        self._owned = [each for each in self._all if each.owner == each.spread.here]
        sizes = [prod(each.shape) for each in self._owned]
        *firsts, total = accumulate(sizes, initial=0)
        memory = scratch.take("whole", total, dtype, device)
        self._whole = [memory[first : first + size] for first, size in zip(firsts, sizes, strict=True)]
        self._arrived: list[Tensor] = []
        self._places: list[Tensor] = []
        for each, whole in zip(self._owned, self._whole, strict=True):
            shaped = whole.view(each.shape)
            for at, part in each.parts:
                local = part.view(each.spread.shape_at(each.layer, at))
                for theirs, ours in each.spread.boxes(each.layer, at):
                    self._arrived.append(local[theirs])
                    self._places.append(shaped[ours])
            each.parts = []
        self._dots = torch.zeros(len(self._owned), 3, dtype=torch.float64, device=device)
        self._stacks: list[Stack] = []
        self._directions: list[Direction] = []
        self._scaled: list[Tensor] = []
        self._gains: list[float] = []

    def _now(self) -> list[Direction]:
        batches = {id(each.batch): each.batch for each in self._all}
        made = {key: batch.directions(self._device) for key, batch in batches.items()}
        return [made[id(each.batch)][each.group] for each in self._all]

    def holds(self) -> bool:
        """Whether what is sent is still of the type that the groups ask for."""
        pairs = zip(self._all, self._now(), strict=True)
        return all(wire_of(each.batch.compute_dtype, direction) == self._dtype for each, direction in pairs)

    def make_room(self) -> None:
        """Before anything is modified: take the memory that the groups, as they are now, ask for."""
        directions = self._now()
        if directions == self._directions:
            return
        gains = [direction.gain(*each.sides) for each, direction in zip(self._all, directions, strict=True)]
        scaled = [(each.steps, gain) for each, gain in zip(self._all, gains, strict=True) if gain != 1.0]
        self._scaled = [steps for steps, _ in scaled if steps.numel() > 0]
        self._gains = [gain for steps, gain in scaled if steps.numel() > 0]
        by_traveller = {id(each): direction for each, direction in zip(self._all, directions, strict=True)}
        runs: list[tuple[tuple[int, int], Run]] = []
        for i, (each, whole) in enumerate(zip(self._owned, self._whole, strict=True)):
            if whole.numel() > 0:
                rows, columns = each.sides
                matrix = whole.view(1, *each.spread.matrix(each.layer))
                # What it is multiplied by waits for the type of the steps.
                runs.append(((rows, columns), Run(matrix, i, by_traveller[id(each)], rows > columns, 1.0)))
        self._stacks = stacks_of(runs, stack_limit(self._device), self._scratch, self._device)
        self._directions = directions

    def run(self) -> None:
        """Replace all steps by their directions."""
        for hop in self._hops:
            hop.go()
        _copy(self._places, self._arrived)
        for i, (each, whole) in enumerate(zip(self._owned, self._whole, strict=True)):
            if whole.numel() > 0:
                # Rows first, in an order that no number of threads changes.
                rows = torch.linalg.vector_norm(whole.view(each.sides), dim=1, dtype=torch.float64)
                self._dots[i, 2] = rows.square_().sum()
        for stack in self._stacks:
            stack.run(self._dots)
        _copy(self._arrived, self._places)
        for hop in reversed(self._hops):
            hop.come_back()
        if self._gains:
            torch._foreach_mul_(self._scaled, self._gains)


def exchanges_of(batches: Sequence[Directed], spreads: Mapping[int, Spread], scratch: Scratch) -> list[Exchange]:
    """What makes the directions of all matrices of ``batches``: one exchange for each type that they travel as.

    ``spreads``: by the number of a slot's tensor.
    """
    found: dict[tuple[torch.dtype, torch.device], list[tuple[tuple[int, int], Traveller]]] = {}
    for batch in batches:
        for slot, steps in zip(batch.given, batch.steps, strict=True):
            spread = spreads[slot.number]
            device = home_of(batch.device, spread.groups)
            direction = batch.directions(device)[id(slot.group)]
            parts = by_layer(steps, slot.layers, slot.layer_dims)
            for i, part in enumerate(parts):
                layer = slot.piece.first + i
                each = Traveller(spread, layer, part, batch, id(slot.group))
                key = wire_of(batch.compute_dtype, direction), device
                found.setdefault(key, []).append(((slot.number, layer), each))
    # The order of what batches there are may differ between processes.
    ordered = {key: [each for _, each in sorted(all_, key=lambda pair: pair[0])] for key, all_ in found.items()}
    kinds = sorted(ordered, key=lambda key: (str(key[0]), key[1].type))
    return [Exchange(ordered[key], scratch, *key) for key in kinds]
