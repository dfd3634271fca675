"""Matrices of one shape, stacked where they lie, so that their directions are made together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ..formulas.direction import Direction
from .scratch import Scratch


@dataclass
class Run:
    """Matrices of one tensor, (n, rows, ...) views of where its steps lie, and their first row among the dots."""

    source: Tensor
    first: int
    direction: Direction
    tall: bool
    gain: float

    def place(self, matrices: Tensor) -> Tensor:
        """(n, rows, columns), rows <= columns, as this run has them."""
        turned = matrices.mT if self.tall else matrices
        shape = self.source.shape[2:]
        return turned.unflatten(2, shape) if len(shape) > 1 else turned


class Stack:
    """Matrices of one shape and one direction, that are made together."""

    def __init__(self, runs: Sequence[Run], shape: tuple[int, int], scratch: Scratch, home: torch.device) -> None:
        self._runs = runs
        self._direction = runs[0].direction
        self._sources = [run.source for run in runs]
        self._firsts = list(accumulate((len(run.source) for run in runs), initial=0))
        count, device = self._firsts[-1], runs[0].source.device
        numel = count * shape[0] * shape[1]
        room = self._direction.room(count, *shape)
        memory = scratch.take("matrices", numel + room, self._direction.dtype, device)
        self._matrices, self._room = memory[:numel].view(count, *shape), memory[numel:]
        rows = [run.first + i for run in runs for i in range(len(run.source))]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=home)
        self._gains = [run.gain for run in runs]
        self._places: dict[int, list[Tensor]] = {}

    def _parts(self, matrices: Tensor) -> list[Tensor]:
        found = self._places.get(matrices.data_ptr())
        if found is None:
            bounds = zip(self._runs, self._firsts, self._firsts[1:], strict=False)
            found = [run.place(matrices[first:end]) for run, first, end in bounds]
            self._places[matrices.data_ptr()] = found
        return found

    def run(self, dots: Tensor) -> None:
        """Replace the steps by their directions; ``dots`` has their squared norms in its last column."""
        torch._foreach_copy_(self._parts(self._matrices), self._sources)
        norms = dots[:, 2].index_select(0, self._rows).sqrt_()
        result = self._direction.run(self._matrices, norms, self._room)
        torch._foreach_copy_(self._sources, self._parts(result))
        if any(gain != 1.0 for gain in self._gains):
            torch._foreach_mul_(self._sources, self._gains)


def cut(runs: Sequence[Run], limit: int) -> Iterator[list[Run]]:
    """The same matrices, at most ``limit`` at a time."""
    part: list[Run] = []
    filled = 0
    for run in runs:
        start = 0
        while start < len(run.source):
            end = min(len(run.source), start + limit - filled)
            part.append(replace(run, source=run.source[start:end], first=run.first + start))
            filled, start = filled + end - start, end
            if filled == limit:
                yield part
                part, filled = [], 0
    if part:
        yield part


def stacks_of(
    runs: Iterable[tuple[tuple[int, int], Run]], limit: Callable[[int, int], int], scratch: Scratch, home: torch.device
) -> list[Stack]:
    """Stacks for runs that are given with the (rows, columns) of their matrices.

    ``limit``: how many matrices of so many rows and columns share one. ``home``: where their squared norms lie.
    """
    alike: dict[tuple[Direction, int, int], list[Run]] = {}
    for sides, run in runs:
        small, large = sorted(sides)
        alike.setdefault((run.direction, small, large), []).append(run)
    return [
        Stack(part, (rows, columns), scratch, home)
        for (_, rows, columns), each in alike.items()
        for part in cut(each, limit(rows, columns))
    ]
