"""Which tensors of a batch are stepped by the same operations, and the numbers that these take."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...formulas.tables import Column, Hyper
from ...state.layout import scalar_device
from ...step.batch import Batch
from .pieces import Run, are_views

#: Elements that are worked on at a time: few enough for a cache, and enough for several threads.
TILE = 2**18

#: Tensors of up to so many elements share a stack with others whose layers are as long.
SMALL = TILE // 2

#: Elements that are measured before they are rotated: few enough for the last cache, and enough for what is computed of
#: each layer to count for little.
WINDOW = 2**20

#: Of a tensor without a gradient.
ABSENT = -1


class Window:
    """Runs that are stepped together, and their ``slots`` and layers, ``rows`` (layers,), in one order."""

    def __init__(self, batch: Batch, runs: Sequence[Run], indices: Sequence[int]) -> None:
        self.runs, self.slots = list(runs), [batch.slots[i] for i in indices]
        spans = [range(batch.first_layers[i], batch.first_layers[i] + batch.slots[i].layers) for i in indices]
        rows = [row for span in spans for row in span]
        self.rows = torch.tensor(rows, dtype=torch.int64, device=batch.dots.device)


class Runs:
    """The runs of one batch, kept from step to step for as long as the same tensors are stepped alike."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._width = len(batch.options(batch.slots[0]))
        self._tags: list[int] = []
        self._runs: list[Run] = []
        self._windows: list[Window] = []
        self._whole: Window | None = None

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    @property
    def whole(self) -> Window:
        """All of the batch as one, with what is not stepped."""
        if self._whole is None:
            self._whole = Window(self._batch, self._runs, range(len(self._batch.slots)))
        return self._whole

    def windows(self) -> list[Window]:
        """All that is stepped, in parts."""
        if not self._windows:
            parts: list[list[Run]] = []
            filled = WINDOW
            for run in self._runs:
                if filled >= WINDOW:
                    parts.append([])
                    filled = 0
                parts[-1].append(run)
                filled += sum(slot.param.numel() for slot in run.slots)
            self._windows = [Window(self._batch, part, [i for run in part for i in run.indices]) for part in parts]
        return self._windows

    def _regroup(self, runs: list[Run], tags: list[int]) -> None:
        self._runs, self._tags = runs, tags
        self._windows, self._whole = [], None

    def refresh(self) -> None:
        """Count the step to come, and take over its gradients and numbers."""
        batch = self._batch
        stepped = [grad is not None and grad.numel() > 0 for grad in batch.grads]
        counted = [slot.step for slot, here in zip(batch.slots, stepped, strict=True) if here and slot.step is not None]
        if batch.taken is not None:
            for step in counted:
                step += batch.taken
        elif counted:
            torch._foreach_add_(counted, 1)
        if batch.dots.device.type == "cpu":
            self._refresh_from_tables(stepped, counted)
        else:
            self._refresh_on_device(stepped)

    def _refresh_from_tables(self, stepped: list[bool], counted: list[Tensor]) -> None:
        """On the CPU all can be read: what has the same numbers is stepped by the same operations."""
        batch = self._batch
        rows, places = batch.hypers.tolist(), batch.tensors[:, Column.HYPER].tolist()
        numbers = [(row[Hyper.GRAD_SCALE], *row[Hyper.OPTION : Hyper.OPTION + self._width]) for row in rows]
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
            self._regroup(self._grouped(tags), tags)
        prepared = []
        for count, scale, *options in kinds:
            made = batch.formula.prepare(torch.tensor(count, dtype=torch.float64), tuple(options))
            prepared.append((scale, tuple(map(float, made))))
        for run in self._runs:
            run.scale, run.options = prepared[tags[run.indices[0]]]

    def _grouped(self, tags: list[int]) -> list[Run]:
        """Stacks of the small tensors of one tag whose layers are equally long, and the others one by one."""
        batch, runs = self._batch, []
        stacks: dict[tuple[object, ...], list[int]] = {}
        filled: dict[tuple[object, ...], int] = {}
        for index, (tag, slot) in enumerate(zip(tags, batch.slots, strict=True)):
            numel = slot.param.numel()
            if tag == ABSENT:
                continue
            if numel > SMALL or not are_views(slot):
                runs.append([index])
                continue
            key = tag, numel // slot.layers, slot.param.shape[1:]
            if key not in stacks or filled[key] + numel > TILE:
                stacks[key], filled[key] = [], 0
                runs.append(stacks[key])
            stacks[key].append(index)
            filled[key] += numel
        return [Run(batch, run, TILE) for run in runs]

    def _refresh_on_device(self, stepped: list[bool]) -> None:
        """Elsewhere the host would have to wait for numbers: each tensor by itself, with what it is known by."""
        batch = self._batch
        tags = [0 if here else ABSENT for here in stepped]
        if tags != self._tags:
            self._regroup([Run(batch, [index], TILE) for index, tag in enumerate(tags) if tag != ABSENT], tags)
        for run in self._runs:
            (index,) = run.indices
            slot, row = batch.slots[index], batch.hyper_row(index)
            options: tuple[float | Tensor, ...] = batch.options(slot)
            run.scale = -1.0 if slot.group["maximize"] else 1.0
            if row is not None:
                run.scale, options = row[Hyper.GRAD_SCALE], row[Hyper.OPTION :][: len(options)].unbind()
            count = 0.0 if slot.step is None else slot.step.to(scalar_device(batch.device)).double()
            run.options = batch.formula.prepare(count, options)


def runs_of(batch: Batch) -> Runs:
    """Those that the batch keeps."""
    if not isinstance(batch.kept, Runs):
        batch.kept = Runs(batch)
    return batch.kept
