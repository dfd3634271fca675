"""Which tensors of a batch are stepped by the same operations, and the numbers that these take."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...formulas.tables import Column, Hyper
from ...state.layout import scalar_device
from ...step.batch import Batch
from .memory import shared_pool
from .pieces import are_views
from .run import Run

#: Elements that are worked on at a time: few enough for a cache, and enough for several threads.
TILE = 2**18

#: Tensors of up to so many elements share a stack with others whose layers are as long.
SMALL = TILE // 2

#: Elements that are measured before they are rotated: few enough for the last cache, and enough for what is computed of
#: each layer to count for little.
WINDOW = 2**22

#: Of a tensor without a gradient.
ABSENT = -1


def can_look(batch: Batch) -> bool:
    """Whether numbers of this batch can be read without waiting for a device."""
    return batch.dots.device.type == "cpu"


class Window:
    """Runs that are stepped together, and what is known of their tensors, layer by layer, in one order.

    ``rows``: the layers among those of the batch. ``radii``: the radius of each tensor; zeros, which nobody reads, of
    one that does not turn.
    """

    def __init__(self, batch: Batch, runs: Sequence[Run], indices: Sequence[int] | None = None) -> None:
        self.runs, slots = list(runs), batch.slots
        # All of them: nothing has to be copied to a device to say so.
        self.rows: slice | Tensor = slice(None)
        if indices is not None:
            slots = [batch.slots[i] for i in indices]
            spans = [range(batch.first_layers[i], batch.first_layers[i] + batch.slots[i].layers) for i in indices]
            rows = [row for span in spans for row in span]
            self.rows = torch.tensor(rows, dtype=torch.int64, device=batch.dots.device)
        self.layers = [slot.layers for slot in slots]
        self.radii = [batch.dots.new_zeros(slot.layers) if slot.radius is None else slot.radius for slot in slots]
        self.turning = [index for index, slot in enumerate(slots) if slot.radius is not None]


class Runs:
    """The runs of one batch, kept from step to step for as long as the same tensors are stepped alike.

    ``window``: what the verbs work on, where a step is taken in parts; None: all. It must not know the batch, which
    knows it: what is in a circle waits for the garbage collector, and its memory with it.
    """

    def __init__(self) -> None:
        self.pool = shared_pool()
        self.window: Window | None = None
        self._tags: list[int] = []
        self._runs: list[Run] = []
        self._windows: list[Window] = []
        self._whole: Window | None = None

    def current(self, batch: Batch) -> Window:
        """What the verbs work on."""
        if self.window is not None:
            return self.window
        if self._whole is None:
            self._whole = Window(batch, self._runs)
        return self._whole

    def windows(self, batch: Batch) -> list[Window]:
        """All that is stepped, in parts."""
        if not self._windows:
            parts: list[list[Run]] = []
            filled = WINDOW
            for run in self._runs:
                if filled >= WINDOW:
                    parts.append([])
                    filled = 0
                parts[-1].append(run)
                filled += run.numel
            self._windows = [Window(batch, part, [i for run in part for i in run.indices]) for part in parts]
        return self._windows

    def refresh(self, batch: Batch) -> None:
        """Count the step to come, and take over its gradients and numbers."""
        self.window = None
        stepped = [grad is not None and grad.numel() > 0 for grad in batch.grads]
        counted = [slot.step for slot, here in zip(batch.slots, stepped, strict=True) if here and slot.step is not None]
        if batch.taken is not None:
            for step in counted:
                step += batch.taken
        elif len(counted) > 1:
            torch._foreach_add_(counted, 1)
        else:
            for step in counted:
                step += 1
        if can_look(batch):
            self._refresh_from_tables(batch, stepped, counted)
        else:
            self._refresh_on_device(batch, stepped)
        self.let_go()

    def let_go(self) -> None:
        """Before a step, and after one that failed: of what may be out of date, or must not outlive a step."""
        for run in self._runs:
            run.begin()

    def _regroup(self, batch: Batch, tags: list[int], groups: list[list[int]]) -> None:
        """Make the runs anew, of these tensors."""
        self._tags, self._windows, self._whole = tags, [], None
        self._runs = [
            Run([batch.slots[i] for i in group], group, [batch.first_layers[i] for i in group], TILE)
            for group in groups
        ]

    def _refresh_from_tables(self, batch: Batch, stepped: list[bool], counted: list[Tensor]) -> None:
        """Where all can be read: what has the same numbers is stepped by the same operations."""
        rows, places = batch.hypers.tolist(), batch.tensors[:, Column.HYPER].tolist()
        width = len(batch.options(batch.slots[0]))
        numbers = [(row[Hyper.GRAD_SCALE], *row[Hyper.OPTION : Hyper.OPTION + width]) for row in rows]
        counts = iter(torch.stack(counted).tolist() if counted else ())
        kinds: dict[tuple[float, ...], int] = {}
        tags = []
        for here, place, slot in zip(stepped, places, batch.slots, strict=True):
            if not here:
                tags.append(ABSENT)
                continue
            count = 0.0 if slot.step is None else next(counts)
            tags.append(kinds.setdefault((count, *numbers[place]), len(kinds)))
        if tags != self._tags:
            self._regroup(batch, tags, _grouped(batch, tags))
        prepared = []
        for count, scale, *options in kinds:
            steps = torch.tensor(count, dtype=torch.float64, device="cpu")
            prepared.append((scale, tuple(map(float, batch.formula.prepare(steps, tuple(options))))))
        for run in self._runs:
            run.scale, run.options = prepared[tags[run.indices[0]]]

    def _refresh_on_device(self, batch: Batch, stepped: list[bool]) -> None:
        """Elsewhere the host would have to wait for numbers: each tensor by itself, with what it is known by."""
        tags = [0 if here else ABSENT for here in stepped]
        if tags != self._tags:
            self._regroup(batch, tags, [[index] for index, tag in enumerate(tags) if tag != ABSENT])
        for run in self._runs:
            (index,) = run.indices
            slot, row = batch.slots[index], batch.hyper_row(index)
            options: tuple[float | Tensor, ...] = batch.options(slot)
            run.scale = -1.0 if slot.group["maximize"] else 1.0
            if row is not None:
                run.scale, options = row[Hyper.GRAD_SCALE], row[Hyper.OPTION :][: len(options)].unbind()
            count = 0.0 if slot.step is None else slot.step.to(scalar_device(batch.device)).double()
            run.options = batch.formula.prepare(count, options)


def _grouped(batch: Batch, tags: Sequence[int]) -> list[list[int]]:
    """Stacks of the small tensors of one tag whose layers are equally long, and the others one by one."""
    groups: list[list[int]] = []
    stacks: dict[tuple[object, ...], list[int]] = {}
    filled: dict[tuple[object, ...], int] = {}
    for index, (tag, slot) in enumerate(zip(tags, batch.slots, strict=True)):
        numel = slot.param.numel()
        if tag == ABSENT:
            continue
        if numel > SMALL or not are_views(slot):
            groups.append([index])
            continue
        key = tag, numel // slot.layers, slot.param.shape[1:]
        if key not in stacks or filled[key] + numel > TILE:
            stacks[key], filled[key] = [], 0
            groups.append(stacks[key])
        stacks[key].append(index)
        filled[key] += numel
    return groups


def runs_of(batch: Batch) -> Runs:
    """Those that the batch keeps."""
    if not isinstance(batch.kept, Runs):
        batch.kept = Runs()
    return batch.kept
