"""The flattened multi-tensor batch: all tensors of one device, type and formula, as tables of numbers.

A backend walks these tables (``tables.py``) with a fixed number of launches however many tensors there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .bases import Base, Formula
from .checks import check_gradient
from .formulas import RULES
from .tables import MAX_OPTIONS, Coefficient, Column, Count, Flag, Hyper, Layer, Tile
from .upload import Mirror
from .watch import Entries, Layouts, addresses, all_there, column, gradients


@dataclass
class Slot:
    """One parameter's place in a batch.

    ``states`` are the buffers of the formula in its order, ``step`` the 0-d float32 number of steps taken (None where
    the formula does not count them), ``radius`` the float64 state (None where the tensor does not rotate), ``layers``
    the number of equal slices, ``dense`` whether these lie in memory one after the other, ``fresh`` whether the state
    was created for the coming step. ``entry`` is what the optimizer keeps for the parameter: the states by their names.
    """

    param: Tensor
    group: Mapping[str, Any]
    base: Base
    label: str
    states: tuple[Tensor, ...]
    step: Tensor | None
    radius: Tensor | None
    layers: int
    dense: bool
    fresh: bool
    entry: Mapping[str, Any] = field(default_factory=dict)

    def gradient(self) -> Tensor | None:
        """This step's gradient, checked, with the parameter's strides where kernels walk both as one run of memory."""
        grad = self.param.grad
        if grad is None:
            return None
        check_gradient(grad, self.param, self.label)
        grad = grad.resolve_neg()
        if not self.dense or grad.stride() == self.param.stride():
            return grad
        return torch.empty_like(self.param).copy_(grad)

    @property
    def flags(self) -> int:
        if self.radius is None:
            return 0
        return Flag.ROTATES | (Flag.CURRENT if self.group["radius"] == "current" else 0)

    @property
    def rule(self) -> int:
        return RULES[self.group["rule"]]


def scalar_device(device: torch.device) -> torch.device:
    """Where the float64 dots and coefficients of tensors on ``device`` live: MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


class Batch:
    """The tables for ``slots``: tensors of one device, dtype and formula, cut into tiles of ``tile`` elements.

    The structure (which tensors, how many layers) is fixed at construction; :meth:`refresh` brings pointers and
    hyperparameters up to date before each step and :meth:`release` lets the gradients go after it. A backend reads
    ``tensors`` (tensors, Column.WIDTH), ``hypers`` (rows, Hyper.WIDTH), ``layers`` (layers, Layer.WIDTH) and ``tiles``
    (tiles, Tile.WIDTH), and writes ``dots`` (layers, 3: n2, d, q), ``coefficients`` (layers, Coefficient.WIDTH),
    ``counts`` (layers, Count.WIDTH), the parameters and their states. All lie on the parameters' device.
    """

    def __init__(self, formula: Formula, slots: Sequence[Slot], tile: int) -> None:
        self.formula = formula
        self.slots = list(slots)
        self.tile = tile
        self.params = [slot.param for slot in self.slots]
        self.states = [[slot.states[i] for slot in self.slots] for i in range(len(formula.states))]
        self.grads: list[Tensor | None] = [None] * len(self.slots)
        self._grad_addresses: bytes | None = None
        self.device = self.params[0].device
        self.dtype = self.params[0].dtype
        self._home = scalar_device(self.device)
        self.n_layers = sum(slot.layers for slot in self.slots)
        self.dots = torch.zeros(self.n_layers, 3, dtype=torch.float64, device=self._home)
        self.coefficients = torch.zeros(self.n_layers, Coefficient.WIDTH, dtype=torch.float64, device=self._home)
        self.counts = torch.zeros(self.n_layers, Count.WIDTH, dtype=torch.int64, device=self._home)

        # Two rows per group: for settled tensors, and for those whose state was created for the coming step.
        self._groups: list[tuple[Mapping[str, Any], Base]] = []
        rows: dict[int, int] = {}
        for slot in self.slots:
            if id(slot.group) not in rows:
                rows[id(slot.group)] = 2 * len(self._groups)
                self._groups.append((slot.group, slot.base))
        self._rows = [rows[id(slot.group)] for slot in self.slots]

        self._hyper_mirror = Mirror(2 * len(self._groups), Hyper.WIDTH, torch.float64, self._home)
        self._tensor_mirror = Mirror(len(self.slots), Column.WIDTH, torch.int64, self._home)
        self.first_layers = list(accumulate((slot.layers for slot in self.slots[:-1]), initial=0))
        table = self._tensor_mirror
        table.set_column(Column.NUMEL, column([slot.param.numel() for slot in self.slots]))
        table.set_column(Column.LAYERS, column([slot.layers for slot in self.slots]))
        table.set_column(Column.FIRST_LAYER, column(self.first_layers))
        table.set_column(Column.FLAGS, column([slot.flags for slot in self.slots]))
        table.set_column(Column.RULE, column([slot.rule for slot in self.slots]))
        table.set_column(Column.RADIUS, addresses([slot.radius for slot in self.slots]))
        table.set_column(Column.STEP, addresses([slot.step for slot in self.slots]))
        table.set_column(Column.PARAM, addresses(self.params))
        for i, states in enumerate(self.states):
            table.set_column(Column.STATE + i, addresses(states))

        self._settled = False
        self._set_hyper_rows()
        columns = {name: [(slot.entry, slot.states[i]) for slot in self.slots] for i, name in enumerate(formula.states)}
        columns["step"] = [(slot.entry, slot.step) for slot in self.slots if slot.step is not None]
        columns["radius"] = [(slot.entry, slot.radius) for slot in self.slots if slot.radius is not None]
        self._entries = Entries(columns)
        self._layouts = Layouts(self.params)
        self._kept = Layouts([tensor for pairs in columns.values() for _, tensor in pairs])
        # Kernels know a gradient by its address, which that of an empty tensor lacks: its steps are counted here.
        self._empty = [(i, slot.step) for i, slot in enumerate(self.slots) if slot.param.numel() == 0]

    def holds(self) -> bool:
        """Whether parameters, states and radii lie in memory as they did when the batch was made for them."""
        return self._entries.hold() and self._layouts.hold() and self._kept.hold()

    def take_gradients(self) -> None:
        """Check this step's gradients and put them in ``grads``. Raises before anything is modified."""
        self.grads = gradients(self.params)
        self._grad_addresses = self._layouts.fit(self.grads)
        if self._grad_addresses is None:
            # All else goes the slow way: gradients that are missing, lie otherwise, or are wrong.
            self.grads = [slot.gradient() for slot in self.slots]

    def refresh(self) -> None:
        """Bring the tables up to date for the step to come on ``grads`` (None: leave that tensor alone)."""
        for index, step in self._empty:
            if step is not None and self.grads[index] is not None:
                step += 1
        table = self._tensor_mirror
        table.set_column(Column.GRAD, self._grad_addresses or addresses(self.grads))
        table.push()
        self._refresh_hypers()

    def _set_hyper_rows(self) -> None:
        rows = [row + slot.fresh for row, slot in zip(self._rows, self.slots, strict=True)]
        self._tensor_mirror.set_column(Column.HYPER, column(rows))

    def _refresh_hypers(self) -> None:
        # The difference of two weights is off by up to half a unit in the last place of each.
        noise = torch.finfo(self.dtype).eps / 2
        rows: list[float] = []
        on_device: list[tuple[int, Tensor]] = []
        for i, (group, base) in enumerate(self._groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                # Copied from device to device below: reading it here would make the host wait.
                on_device.append((2 * i, lr))
                lr = 0.0
            head = (
                float(lr),
                float(group["weight_decay"]),
                -1.0 if group["maximize"] else 1.0,
                noise if group.get("difference") else 0.0,
            )
            for fresh in (False, True):
                scalars = base.scalars(group, fresh)
                rows += (*head, *scalars, *(0.0,) * (MAX_OPTIONS - len(scalars)))
        self._hyper_mirror.set_all(rows)
        self._hyper_mirror.push()
        for row, value in on_device:
            self._hyper_mirror.device_tensor[row : row + 2, Hyper.LR].copy_(value.reshape(1))

    def release(self) -> None:
        """After a step: drop the gradients, so that zero_grad frees them, and settle the slots that had one."""
        if not self._settled:
            for slot, grad in zip(self.slots, self.grads, strict=True):
                slot.fresh &= grad is None
            self._settled = not any(slot.fresh for slot in self.slots)
            self._set_hyper_rows()
        self.grads, self._grad_addresses = [None] * len(self.slots), None

    @property
    def stepped(self) -> list[Tensor]:
        """The parameters that have a gradient in this step."""
        if all_there(self.grads):
            return self.params
        return [param for param, grad in zip(self.params, self.grads, strict=True) if grad is not None]

    def lr_of(self, slot: Slot) -> Tensor:
        """The rotation rate of ``slot`` in the last step, 0-d on the device."""
        row = next(row for row, (group, _) in enumerate(self._groups) if group is slot.group)
        return self.hypers[2 * row, Hyper.LR]

    def options(self, slot: Slot) -> tuple[float, ...]:
        """What the base makes of the group of ``slot``, on the host: ``formula.prepare`` makes this step's of it."""
        return slot.base.scalars(slot.group, slot.fresh)

    @property
    def tensors(self) -> Tensor:
        """The tensor table, (tensors, Column.WIDTH) int64."""
        return self._tensor_mirror.device_tensor

    @property
    def hypers(self) -> Tensor:
        """The hyperparameter table, (rows, Hyper.WIDTH) float64."""
        return self._hyper_mirror.device_tensor

    @cached_property
    def layer_tensors(self) -> Tensor:
        """The tensor row of each layer, (layers,) int64."""
        return self.layers[:, Layer.TENSOR]

    @cached_property
    def layers(self) -> Tensor:
        """The layer table, (layers, Layer.WIDTH) int64."""
        rows, first_tile = [], 0
        for tensor, slot in enumerate(self.slots):
            length = slot.param.numel() // slot.layers
            tiles = -(-length // self.tile)
            for _ in range(slot.layers):
                rows.append((tensor, first_tile, tiles))
                first_tile += tiles
        return torch.tensor(rows, dtype=torch.int64, device=self._home)

    @cached_property
    def tiles(self) -> Tensor:
        """The tile table, (tiles, Tile.WIDTH) int64."""
        rows, layer = [], 0
        for tensor, slot in enumerate(self.slots):
            length = slot.param.numel() // slot.layers
            for i in range(slot.layers):
                rows += [
                    (tensor, layer + i, i * length + start, min(self.tile, length - start))
                    for start in range(0, length, self.tile)
                ]
            layer += slot.layers
        return torch.tensor(rows, dtype=torch.int64, device=self._home).reshape(-1, Tile.WIDTH)

    @cached_property
    def n_tiles(self) -> int:
        return sum(slot.layers * -(-(slot.param.numel() // slot.layers) // self.tile) for slot in self.slots)

    @cached_property
    def partials(self) -> Tensor:
        """Scratch for the dots of each tile, (tiles, 3) float64."""
        return torch.zeros(self.n_tiles, 3, dtype=torch.float64, device=self._home)

    @cached_property
    def step_options(self) -> Tensor:
        """This step's options of every tensor, (tensors, MAX_OPTIONS) float64, where the formula counts its steps."""
        return torch.zeros(len(self.slots), MAX_OPTIONS, dtype=torch.float64, device=self._home)

    @cached_property
    def partial_counts(self) -> Tensor:
        """Scratch for the non-finite elements of each tile, (tiles,) int64."""
        return torch.zeros(self.n_tiles, dtype=torch.int64, device=self._home)
