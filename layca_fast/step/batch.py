"""The flattened multi-tensor batch: all tensors of one device, type and formula, as tables of numbers.

A backend walks these tables (``tables.py``) with a fixed number of launches however many tensors there are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..compat import local_tensor, spec_of
from ..formulas.bases import Formula
from ..formulas.tables import Coefficient, Column, Count
from ..state.compensation import compute_dtype
from ..state.layout import scalar_device
from ..state.modes import out_of_inference
from ..state.sharding import is_sharded, local_of
from ..state.slot import Slot
from .hypers import Hyperparameters
from .structure import Structure
from .unscaling import LossScale, ScaledTables
from .upload import SPARES, Mirror
from .watch import Entries, Layouts, addresses, all_there, column, gradients, same_objects

if TYPE_CHECKING:
    from .backend import Backend
    from .learned_radius import LearnedRadii

#: Tensors whose descriptions are asked of memory together, and then fit into a core's cache.
FETCHED = 1000


class Batch(Structure):
    """The tables for ``slots``: tensors of one device, dtype and formula, cut into tiles of ``tile`` elements.

    All of them have a remainder or none has. Formulas run in ``compute_dtype``, on states of ``state_dtype`` and on
    gradients of ``grad_dtype``, which may differ from step to step: the parameters' own type, or ``compute_dtype``
    where one of them has a gradient of another.

    The structure (which tensors, how many layers) is fixed at construction; :meth:`refresh` brings pointers and
    hyperparameters up to date before each step and :meth:`release` lets the gradients go after it. A backend reads
    ``tensors`` (tensors, Column.WIDTH), ``hypers`` (rows, Hyper.WIDTH), ``layers`` (layers, Layer.WIDTH) and ``tiles``
    (tiles, Tile.WIDTH), and writes ``dots`` (layers, 3: n2, d, q), ``coefficients`` (layers, Coefficient.WIDTH),
    ``counts`` (layers, Count.WIDTH), the parameters and their states. All lie on the parameters' device.
    """

    #: What of its radii is learned, which ``learned_radius.py`` sets; None where nothing is.
    learned: "LearnedRadii | None" = None

    #: What its backend keeps for it from step to step.
    kept: Any = None

    def __init__(self, formula: Formula, slots: Sequence[Slot], tile: int) -> None:
        self.formula = formula
        self.slots = list(slots)
        self.tile = tile
        self.params = [slot.param for slot in self.slots]
        self.owners = [slot.owner for slot in self.slots]
        self._local_owners = [local_of(owner) for owner in self.owners] if is_sharded(self.owners[0]) else None
        self.states = [[slot.states[i] for slot in self.slots] for i in range(len(formula.states))]
        self.grads: list[Tensor | None] = [None] * len(self.slots)
        self._grad_addresses: bytes | None = None
        self._specs: list[Any] | None = None
        #: What :meth:`look` has found, for :meth:`take_gradients`.
        self._seen: tuple[list[Any], bytes | None] | None = None
        self.device = self.params[0].device
        self.dtype = self.params[0].dtype
        self.compute_dtype = compute_dtype(self.dtype)
        self.state_dtype = self.slots[0].states[0].dtype if formula.states else self.compute_dtype
        self.grad_dtype = self.dtype
        self.compensated = self.slots[0].remainder is not None
        self._home = scalar_device(self.device)
        self.n_layers = sum(slot.layers for slot in self.slots)
        self.dots = torch.zeros(self.n_layers, 3, dtype=torch.float64, device=self._home)
        self.coefficients = torch.zeros(self.n_layers, Coefficient.WIDTH, dtype=torch.float64, device=self._home)
        self.counts = torch.zeros(self.n_layers, Count.WIDTH, dtype=torch.int64, device=self._home)

        self.hyperparameters = Hyperparameters(self.slots, self.dtype, self._home)
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
        table.set_column(Column.REMAINDER, addresses([slot.remainder for slot in self.slots]))
        for i, states in enumerate(self.states):
            table.set_column(Column.STATE + i, addresses(states))

        self._settled = False
        self._scaled: ScaledTables | None = None
        #: Whether the step is taken, 0-d int64 on the device; None where that needs no asking.
        self.taken: Tensor | None = None
        self._set_hyper_rows()
        kept = [tensor for states in self.states for tensor in states]
        kept += [slot.step for slot in self.slots if slot.step is not None]
        kept += [slot.remainder for slot in self.slots if slot.remainder is not None]
        kept += [slot.radius for slot in self.slots if slot.radius is not None]
        entries = [slot.entry for slot in self.slots]
        names = (*formula.states, "step", "remainder", "radius")
        self._entries = Entries([(each, name, each[name]) for each in entries for name in names if name in each])
        self._layouts = Layouts(self.params)
        self._are_owners = same_objects(self.params, self.owners)
        self._kept = Layouts(kept, owned=True)
        # A view still knows the memory that its tensor has left.
        cut = [slot for slot in self.slots if slot.piece.is_view]
        self._has_views = bool(cut)
        wholes = [local_of(slot.owner) for slot in cut]
        wholes += [local_of(slot.entry[name]) for slot in cut for name in names if name in slot.entry]
        self._wholes = Layouts(wholes)
        # Kernels know a gradient by its address, which that of an empty tensor lacks: its steps are counted here.
        self._empty = [(i, slot.step) for i, slot in enumerate(self.slots) if slot.param.numel() == 0]

    def holds(self) -> bool:
        """Whether parameters, states and radii lie in memory as they did when the batch was made for them."""
        return self._others_hold() and self._layouts.hold()

    def look(self) -> bool:
        """:meth:`holds`, and :meth:`take_gradients` will take the gradients that are there now: it follows at once."""
        if not self._are_owners:
            return self.holds()
        if not self._others_hold():
            return False
        self._seen = self._layouts.look()
        return self._seen is not None

    def forget_look(self) -> None:
        """After :meth:`look`, where the step is not taken: let go of the gradients."""
        self._seen = None

    def _others_hold(self) -> bool:
        self._seen = None
        if self._local_owners is not None and not same_objects(list(map(local_of, self.owners)), self._local_owners):
            return False
        return self._entries.hold() and self._kept.hold() and (not self._has_views or self._wholes.hold())

    def take_gradients(self) -> None:
        """Check this step's gradients and put them in ``grads``. Raises before anything is modified."""
        self.grad_dtype = self.dtype
        plain: list[Any] | None
        if self._seen is not None:
            (self.grads, self._grad_addresses), self._seen = self._seen, None
            plain = self.grads
        else:
            self.grads = gradients(self.owners)
            plain = self._plain_gradients()
            self._grad_addresses = None if plain is None else self._layouts.fit(plain)
        if plain is not None and self._grad_addresses is not None:
            self.grads = plain
        else:
            owned = self.grads
            # All else goes the slow way: gradients that are missing, lie otherwise, are of another type, or are wrong.
            if any(grad is not None and grad.dtype != self.dtype for grad in self.grads):
                self.grad_dtype = self.compute_dtype
            self.grads = [slot.gradient(self.grad_dtype) for slot in self.slots]
            self._specs = self._known_specs(owned)

    def _plain_gradients(self) -> list[Any] | None:
        """The gradients as plain tensors; of DTensors only where they are shared out as those of the last step."""
        if self._local_owners is None:
            return self._viewed(self.grads) if self._has_views else self.grads
        if self._specs is None or not all(map(is_sharded, self.grads)):
            return None
        same = same_objects(list(map(spec_of, self.grads)), self._specs)
        return list(map(local_tensor, self.grads)) if same else None

    def _viewed(self, grads: Sequence[Any]) -> list[Any] | None:
        """Of plain gradients what each slot is a view of; None where one is no such tensor, or has another shape."""
        found = []
        for slot, grad in zip(self.slots, grads, strict=True):
            if slot.piece.is_view:
                if type(grad) is not Tensor or grad.layout != torch.strided or grad.shape != slot.owner.shape:
                    return None
                grad = slot.piece.of(grad)
            found.append(grad)
        return found

    def _known_specs(self, grads: Sequence[Any]) -> list[Any] | None:
        """What tells how these gradients, of DTensors, are shared out, if that is as their parameters and uncut."""
        if self._local_owners is None or not all_there(grads):
            return None
        if self._has_views:
            return None
        owners: Sequence[Any] = self.owners
        alike = all(grad.placements == owner.placements for grad, owner in zip(grads, owners, strict=True))
        return list(map(spec_of, grads)) if alike else None

    def check_capture(self) -> None:
        """Raise RuntimeError if the host would have to do something for the step that is being captured."""
        fresh = any(slot.fresh and grad is not None for slot, grad in zip(self.slots, self.grads, strict=True))
        if fresh or not self.hyperparameters.are_pushed():
            raise RuntimeError(
                "the device does not have the hyperparameters of the step being captured: before the capture, take the "
                "first step of every tensor, and call optimizer.sync_hyperparameters() after any later change"
            )
        if not self._tensor_mirror.can_record():
            raise RuntimeError(
                "no memory is ready for another CUDA graph, and a capture must not take any: call "
                f"optimizer.sync_hyperparameters() before the capture, after every {SPARES} captures at least, and "
                "after setting capturable=True in a group"
            )

    def sync_hyperparameters(self) -> None:
        """Outside of captures: what the next captures and replays need of the host."""
        self.hyperparameters.push_ahead()
        if self.hyperparameters.capturable:
            self._tensor_mirror.keep_spares()

    def are_recorded(self) -> bool:
        """Whether a CUDA graph that recorded the last step follows the hyperparameters as they are now."""
        return self.hyperparameters.are_recorded()

    def make_room(self, backend: "Backend") -> None:
        """Before anything is modified: take the memory that the step by ``backend`` needs."""
        backend.reserve(self)
        if self.learned is not None:
            backend.reserve(self.learned.batch)

    def advance(self, backend: "Backend") -> None:
        """What comes before *measure*, where shared matrices have directions."""

    def call(self, backend: "Backend") -> Callable[[], object]:
        """What takes the step when it is called, after :meth:`refresh`."""
        return backend.call(self) if self.learned is None else partial(self.learned.step, backend)

    def refresh(
        self, loss_scale: LossScale | None = None, capturing: bool = False, edition: object | None = None
    ) -> None:
        """Bring the tables up to date for the step to come on ``grads`` (None: leave that tensor alone).

        With ``capturing`` a CUDA graph is being recorded, to which the table of addresses then belongs. ``edition``: of
        the groups, as :class:`KnownGroups` has it.
        """
        self.hyperparameters.see(edition)
        table = self._tensor_mirror
        if self._scaled is None and loss_scale is not None:
            with out_of_inference():
                self._scaled = ScaledTables(self.tensors, self.hypers, self._await_first_gradients())
        if self._scaled is not None:
            # The device has modified these.
            table.forget(Column.GRAD)
            table.forget(Column.HYPER)
            self._set_hyper_rows()
        table.set_column(Column.GRAD, self._grad_addresses or addresses(self.grads))
        if capturing:
            table.record()
            self.hyperparameters.record()
        else:
            if self.hyperparameters.capturable:
                table.keep_spares()
            table.push()
            self.hyperparameters.push()
        self.fetch(loss_scale)

    def fetch(self, loss_scale: LossScale | None = None) -> None:
        """Take over what only the device knows: rates in tensors, the loss scale. The host reads none of it."""
        self.hyperparameters.fetch()
        if self._scaled is not None:
            self.taken = self._scaled.apply(loss_scale or LossScale())

    def reserve(self) -> None:
        """Make the tables that are made when they are first used."""
        _ = self.layers, self.tiles, self.partials, self.partial_counts, self.step_options

    def _await_first_gradients(self) -> Tensor:
        """Which tensors have yet to take their first gradient, (tensors,) int64 on the device.

        Steps since their state was made may all have been skipped, also in a run that this one resumes. Only the state
        itself, still of zeros, can tell; it is asked where it matters.
        """
        flags = torch.tensor([slot.fresh for slot in self.slots], dtype=torch.int64, device=self._home)
        for index, slot in enumerate(self.slots):
            rows = (slot.base.scalars(slot.group, fresh) for fresh in (False, True))
            if not slot.fresh and len(set(rows)) > 1:
                flags[index : index + 1] = ~slot.states[0].any()
        return flags

    def _set_hyper_rows(self) -> None:
        rows = self.hyperparameters.first_rows
        if self._scaled is None:
            rows = [row + slot.fresh for row, slot in zip(rows, self.slots, strict=True)]
        self._tensor_mirror.set_column(Column.HYPER, column(rows))

    def count_writes(self) -> None:
        """Tell autograd that the parameters were written to: graphs which saved these weights are out of date."""
        stepped = self.stepped
        if stepped is not self.params:
            increment_version(stepped)
            return
        # The kernels have driven what torch keeps of each out of the caches.
        for first in range(0, len(stepped), FETCHED):
            self._layouts.fetch(first, first + FETCHED)
            increment_version(stepped[first : first + FETCHED])

    def release(self) -> None:
        """After a step: drop the gradients, so that zero_grad frees them, and settle the slots that had one."""
        for index, step in self._empty:
            if step is not None and self.grads[index] is not None:
                step += 1 if self.taken is None else self.taken
        if self._scaled is not None:
            self._scaled.settle()
        if not self._settled:
            for slot, grad in zip(self.slots, self.grads, strict=True):
                slot.fresh &= grad is None
            self._settled = not any(slot.fresh for slot in self.slots)
            self._set_hyper_rows()
        self.grads, self._grad_addresses = [None] * len(self.slots), None

    @property
    def is_one_call(self) -> bool:
        """Whether the backend takes the step in one call, so that a compiled one takes all of it or none."""
        return self.learned is None

    @property
    def is_delicate(self) -> bool:
        """Whether the step, or :meth:`release`, does what must not be done twice, or by halves."""
        return self.learned is not None or not self._settled or bool(self._empty)

    @property
    def given(self) -> list[Slot]:
        """The slots as they were given, with the groups that the user knows."""
        return self.slots

    @property
    def given_grads(self) -> list[Tensor | None]:
        """The gradients of this step as they were given."""
        return self.grads

    @property
    def given_grad_dtype(self) -> torch.dtype:
        """The type of :attr:`given_grads`."""
        return self.grad_dtype

    @property
    def stepped(self) -> list[Tensor]:
        """The parameters that have a gradient in this step; of a DTensor both it and the tensor inside."""
        stepped = self.params
        if self._grad_addresses is None and not all_there(self.grads):
            stepped = [param for param, grad in zip(self.params, self.grads, strict=True) if grad is not None]
        return stepped if self._local_owners is None else [*stepped, *self.owners]

    def options(self, slot: Slot) -> tuple[float, ...]:
        """What the base makes of the group of ``slot``, on the host: ``formula.prepare`` makes this step's of it."""
        return slot.base.scalars(slot.group, slot.fresh)

    def hyper_row(self, index: int) -> Tensor | None:
        """The hyperparameters of a slot, where the device knows more of them than the host: (Hyper.WIDTH,)."""
        if self._scaled is None and not self.slots[index].group.get("capturable"):
            return None
        # Not by indexing: with a number on the device that would make the host wait.
        return self.hypers.index_select(0, self.tensors[index : index + 1, Column.HYPER])[0]

    @property
    def tensors(self) -> Tensor:
        """The tensor table, (tensors, Column.WIDTH) int64."""
        return self._tensor_mirror.device_tensor

    @property
    def hypers(self) -> Tensor:
        """The hyperparameter table, (rows, Hyper.WIDTH) float64."""
        return self.hyperparameters.table
