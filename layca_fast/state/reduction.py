"""Sums over processes: rows of one float64 table, each over its own groups, by one collective per group."""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = tuple["ProcessGroup", ...]


def home_of(device: torch.device, groups: Sequence["ProcessGroup"]) -> torch.device:
    """Where the groups can send what lies on ``device``: offloaded shards on the CPU may be known to NCCL only."""
    for group in groups:
        able = group._device_types
        if device.type not in {each.type for each in able}:
            return torch.device(able[0].type, torch.accelerator.current_device_index())
    return device


class Reduction:
    """Rows of a float64 table of which each is summed over its own groups of processes, in place.

    ``layout`` has (rows, groups) for each part of the table, in the same order on all processes, with parts of no rows
    where others have some: the groups take their turns in the order in which they come up. Memory is taken once. Groups
    of one process have nothing to sum.
    """

    def __init__(self, layout: Sequence[tuple[int, Groups]], width: int, device: torch.device) -> None:
        firsts = list(accumulate((rows for rows, _ in layout), initial=0))
        of_group: dict[ProcessGroup, list[int]] = {}
        for first, (rows, groups) in zip(firsts, layout, strict=False):
            for group in groups:
                if group.size() > 1:
                    of_group.setdefault(group, []).extend(range(first, first + rows))
        self.table = torch.zeros(firsts[-1], width, dtype=torch.float64, device=home_of(device, list(of_group)))
        self._sums: list[tuple[ProcessGroup, Tensor | None, Tensor]] = []
        for group, summed in of_group.items():
            if not summed:
                continue
            if len(summed) == firsts[-1]:
                self._sums.append((group, None, self.table))
            else:
                index = torch.tensor(summed, dtype=torch.int64, device=self.table.device)
                self._sums.append((group, index, self.table.new_zeros(len(summed), width)))

    def run(self, op: str = "sum") -> None:
        """All-reduce the table: op "sum", "min" or "max"."""
        for group, index, buffer in self._sums:
            if index is not None:
                torch.index_select(self.table, 0, index, out=buffer)
            torch.distributed.all_reduce(buffer, getattr(torch.distributed.ReduceOp, op.upper()), group)
            if index is not None:
                self.table.index_copy_(0, index, buffer)


def reduce_together(parts: Sequence[tuple[Tensor, Groups]], op: str) -> None:
    """All-reduce float64 vectors in place, each over its own groups, with one collective per group."""
    if not parts:
        return
    reduction = Reduction([(len(vector), groups) for vector, groups in parts], 1, parts[0][0].device)
    rows = reduction.table.split([len(vector) for vector, _ in parts])
    for row, (vector, _) in zip(rows, parts, strict=True):
        row.copy_(vector.unsqueeze(1))
    reduction.run(op)
    for row, (vector, _) in zip(rows, parts, strict=True):
        vector.copy_(row.squeeze(1))
