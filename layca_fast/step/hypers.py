"""The hyperparameter table of a batch, brought up to date with the param groups before every step."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..formulas.base_options import not_negative
from ..formulas.bases import Base
from ..formulas.tables import MAX_OPTIONS, Hyper
from ..state.compensation import compute_dtype
from .upload import Mirror

if TYPE_CHECKING:
    from ..state.slot import Slot

#: Of a group whose gradients are differences of weights. No name that a group of somebody else's could have by chance.
DIFFERENCE = "layca_fast.difference"


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
        # The difference of two weights is off by up to half a unit in the last place of each: remainders count.
        self._noise = torch.finfo(compute_dtype(dtype)).eps / 2
        self._mirror = Mirror(2 * len(self._groups), Hyper.WIDTH, torch.float64, device)
        self._rates: list[tuple[int, Tensor]] = []
        self._recorded: dict[int, Tensor] = {}
        self._is_recorded = False
        self._edition: object | None = None
        self._rows: list[float] = []
        #: Of each group, the rate in the table, where it is a float and the edition is known.
        self._floats: list[Any] = []
        self.see(None)
        #: The rates of the last step, where the table may have moved on since.
        self._last_rates = torch.zeros(2 * len(self._groups), dtype=torch.float64, device=device)
        self._has_last_rates = False

    @property
    def table(self) -> Tensor:
        """The copy on the device."""
        return self._mirror.device_tensor

    def see(self, edition: object | None) -> None:
        """Before a step: that the groups are of this ``edition``, as :class:`KnownGroups` has it."""
        if edition is None or edition is not self._edition:
            # It is known once all is done: a signal may interrupt this.
            self._edition, self._rows = None, []
            #: Whether a step of any of the groups may be captured.
            self.capturable = any(group.get("capturable") for group, _ in self._groups)
            self._edition = edition

    def _is_for_the_device(self, lr: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether a rate is to be copied from device to device: reading it here could make the host wait."""
        return lr.device.type != "cpu" or bool(group.get("capturable") and self.table.device.type == "cpu")

    def _values(self) -> tuple[list[float], list[tuple[int, Tensor]]]:
        """What the host knows of the table, row by row, and the rates that it does not: (first row, rate)."""
        rows: list[float] = []
        rates: list[tuple[int, Tensor]] = []
        for i, (group, base) in enumerate(self._groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) and self._is_for_the_device(lr, group):
                rates.append((2 * i, lr))
                lr = 0.0
            head = (
                not_negative(lr),
                not_negative(group["weight_decay"]),
                -1.0 if group["maximize"] else 1.0,
                self._noise if group.get(DIFFERENCE) else 0.0,
            )
            radius_lr = float(group["radius_lr"]) if group["radius"] == "learned" else 0.0
            for fresh in (False, True):
                scalars = base.scalars(group, fresh)
                rows += (*head, *scalars, *(0.0,) * (MAX_OPTIONS - len(scalars)), radius_lr)
        return rows, rates

    def push_ahead(self) -> None:
        """:meth:`push` for the next step, of which the last one is not to be told."""
        self.see(None)
        self._keep_rates()
        self.push()

    def _keep_rates(self) -> None:
        if not self._has_last_rates:
            self._last_rates.copy_(self.table[:, Hyper.LR])
            self._has_last_rates = True

    def push(self) -> None:
        """Bring the table up to date with what the host knows."""
        if not self._rows or not self._follow_rates():
            rows, rates = self._values()
            if self._were_tensors(rates):
                # The device has written there what the host knows nothing of.
                self._mirror.forget(-1)
            self._rates = rates
            self._mirror.set_all(rows)
            floats = [group["lr"] for group, _ in self._groups]
            # What a tensor holds may change at any time.
            is_known = self._edition is not None and all(type(lr) is float for lr in floats)
            self._rows, self._floats = rows if is_known else [], floats
        self._mirror.push()

    def _follow_rates(self) -> bool:
        """Bring the table up to date where nothing but rates may have changed; whether all of these are numbers."""
        changed = []
        for i, (group, _) in enumerate(self._groups):
            lr = group["lr"]
            if lr is not self._floats[i]:
                if type(lr) is not float:
                    return False
                changed.append((i, lr))
        if changed:
            # They are known again once all is written: a signal may interrupt this.
            rows, self._rows = self._rows, []
            for i, lr in changed:
                self._floats[i] = lr
                for row in (2 * i, 2 * i + 1):
                    rows[row * Hyper.WIDTH + Hyper.LR] = lr
            self._mirror.set_all(rows)
            self._rows = rows
        return True

    def _were_tensors(self, rates: Sequence[tuple[int, Tensor]]) -> bool:
        """Whether a rate was a tensor at the last push that is none in ``rates``, those of the next."""
        return not {row for row, _ in self._rates} <= {row for row, _ in rates}

    def fetch(self) -> None:
        """For the coming step: copy the rates that are tensors on the device into the table."""
        for row, value in self._rates:
            self.table[row : row + 2, Hyper.LR].copy_(value.reshape(1))
        self._has_last_rates = False
        if self.capturable:
            # A replay is a step that the host does not see.
            self._keep_rates()

    def are_pushed(self) -> bool:
        """Whether there would be nothing to push."""
        rows, rates = self._values()
        return self._mirror.holds(rows) and not self._were_tensors(rates)

    def record(self) -> None:
        """While a CUDA graph is captured: take the rates from the tensors that hold them now, and remember these."""
        _, self._rates = self._values()
        self._recorded = dict(self._rates)
        self._is_recorded = True

    def are_recorded(self) -> bool:
        """Whether the last CUDA graph takes every rate from where it is now: from the same tensor, or from the host."""
        rates = dict(self._values()[1])
        same = rates.keys() == self._recorded.keys() and all(rates[row] is self._recorded[row] for row in rates)
        return same or not self._is_recorded

    @property
    def last_rates(self) -> Tensor:
        """The rotation rates of the last step, (rows,) on the device."""
        return self._last_rates if self._has_last_rates else self.table[:, Hyper.LR]

    def lr_of(self, slot: "Slot") -> Tensor:
        """The rotation rate of ``slot`` in the last step, 0-d on the device."""
        row = next(row for row, (group, _) in enumerate(self._groups) if group is slot.group)
        return self.last_rates[2 * row]
