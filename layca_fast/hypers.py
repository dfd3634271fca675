"""The hyperparameter table of a batch, brought up to date with the param groups before every step."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bases import Base
from .tables import MAX_OPTIONS, Hyper
from .upload import Mirror

if TYPE_CHECKING:
    from .batch import Slot


class Hyperparameters:
    """The table of (rows, Hyper.WIDTH) numbers that the groups of ``slots`` make, float64 on ``device``.

    Each group has two rows: one for settled tensors, and the next for those whose state was created for the coming
    step. ``first_rows`` has the first for each slot.
    """

    def __init__(self, slots: "Sequence[Slot]", dtype: torch.dtype, device: torch.device) -> None:
        self._groups: list[tuple[Mapping[str, Any], Base]] = []
        rows: dict[int, int] = {}
        for slot in slots:
            if id(slot.group) not in rows:
                rows[id(slot.group)] = 2 * len(self._groups)
                self._groups.append((slot.group, slot.base))
        self.first_rows = [rows[id(slot.group)] for slot in slots]
        # The difference of two weights is off by up to half a unit in the last place of each.
        self._noise = torch.finfo(dtype).eps / 2
        self._mirror = Mirror(2 * len(self._groups), Hyper.WIDTH, torch.float64, device)
        self._rates: list[tuple[int, Tensor]] = []
        self._recorded: list[tuple[Mapping[str, Any], Tensor]] = []

    @property
    def table(self) -> Tensor:
        """The copy on the device."""
        return self._mirror.device_tensor

    def _reads_on_device(self, group: Mapping[str, Any]) -> bool:
        """Whether the rate is to be copied from device to device: reading it here could make the host wait."""
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            return False
        return lr.device.type != "cpu" or bool(group.get("capturable") and self.table.device.type == "cpu")

    def _values(self) -> list[float]:
        """What the host knows of the table, row by row."""
        rows: list[float] = []
        for group, base in self._groups:
            head = (
                0.0 if self._reads_on_device(group) else float(group["lr"]),
                float(group["weight_decay"]),
                -1.0 if group["maximize"] else 1.0,
                self._noise if group.get("difference") else 0.0,
            )
            for fresh in (False, True):
                scalars = base.scalars(group, fresh)
                rows += (*head, *scalars, *(0.0,) * (MAX_OPTIONS - len(scalars)))
        return rows

    def push(self) -> None:
        """Bring the table up to date with what the host knows."""
        self._rates = [
            (2 * i, group["lr"]) for i, (group, _) in enumerate(self._groups) if self._reads_on_device(group)
        ]
        self._mirror.set_all(self._values())
        self._mirror.push()

    def fetch(self) -> None:
        """Copy the rates that are tensors on the device into the table."""
        for row, value in self._rates:
            self.table[row : row + 2, Hyper.LR].copy_(value.reshape(1))

    def are_pushed(self) -> bool:
        """Whether there would be nothing to push."""
        return self._mirror.holds(self._values())

    def record(self) -> None:
        """Remember which tensors a CUDA graph takes rates from, for :meth:`are_recorded`."""
        self._recorded += [(self._groups[row // 2][0], value) for row, value in self._rates]

    def are_recorded(self) -> bool:
        """Whether the rates of all groups are in the tensors that CUDA graphs take them from."""
        return all(group["lr"] is value for group, value in self._recorded)

    def lr_of(self, slot: "Slot") -> Tensor:
        """The rotation rate of ``slot`` in the last step, 0-d on the device."""
        row = next(row for row, (group, _) in enumerate(self._groups) if group is slot.group)
        return self.table[2 * row, Hyper.LR]
