"""From param groups to batches: which tensors are stepped, by which backend, with which state."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..compat import is_fake, modes_are_on
from ..formulas.bases import Formula
from ..formulas.chunks import as_tuples
from ..formulas.options import decays, find_base, is_given, waits
from ..formulas.rotation import KEEP
from ..formulas.tables import Coefficient
from ..messages import labelled
from ..state.compensation import state_dtype
from ..state.members import Member, State, drop_remainders, members
from ..state.memory import check_apart
from ..state.modes import announce, check_modes
from ..state.reduction import Groups
from ..state.runner import Choose
from ..state.sharding import is_elsewhere, is_sharded
from ..state.slot import Slot
from ..state.spread import Spread
from ..state.zeros import Layers, check_norms
from .backend import Backend
from .batch import Batch
from .capture import check_capture, is_capturing
from .directions import batches_of
from .learned_radius import learned_radii
from .scratch import Scratch
from .taking import Pair, reserve, take
from .together import Together
from .unscaling import LossScale
from .watch import gradients, same_objects, values_are


def _signature(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """All that fixes the structure of the batches, beside the tensors themselves."""
    return [
        (
            id(group),
            find_base(group["base"]).formula(group).name,
            group["base"],
            group["rule"],
            group["rotate"],
            as_tuples(group["chunks"]),
            as_tuples(group.get("chunk_names")),
            group["radius"],
            group["joins_at"],
            group["backend"],
            decays(group),
            group["compensate"],
            group["state_dtype"],
        )
        for group in groups
    ]


def _written(batch: Batch) -> list[Tensor]:
    """All that a step on the present gradients writes to, beside the batch's own tables."""
    # As they were given: where matrices have directions, the slots of the batch itself know no state.
    taken = [slot for slot, grad in zip(batch.given, batch.given_grads, strict=True) if grad is not None]
    own = [each for slot in taken for each in (slot.step, slot.radius, slot.remainder) if each is not None]
    return [*(slot.param for slot in taken), *(state for slot in taken for state in slot.states), *own]


class Plan:
    """The batches for the parameters that have a gradient or had one before, and the state that they need.

    ``choose`` finds the backend of a tensor. Building it checks everything, then creates the missing state in
    ``state``; nothing is modified if a check fails. ``scratch``: memory that plans which never step at one time share.
    """

    # What is made here is written to by steps of every mode. To leave inference mode switches gradients on.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: State,
        choose: Choose[Backend],
        previous: "Plan | None" = None,
        scratch: Scratch | None = None,
    ) -> None:
        if is_capturing():
            check_capture(groups)
            raise RuntimeError(
                "the step being captured would have to create or change state: take a step before the capture, with "
                "gradients for the same parameters (one at lr = 0 moves nothing)"
            )
        stepped = set() if previous is None else {id(slot.owner) for _, slot, _ in previous.rows()}
        found = list(members(groups, state, stepped, choose))
        states = [member.new_states(state.get(member.param, {})) for member in found]
        check_apart([each for member, (_, local) in zip(found, states, strict=True) for each in member.written(local)])
        known = set() if previous is None else {id(each.param) for each in previous._zero}
        turning = [
            Layers(m.group, m.label, m.param, m.cut)
            for m in found
            if m.rotates and m.cut is not None and not waits(m.group)
        ]
        # A process may make its plan anew alone: what is agreed upon is not asked before they all have to.
        zero = [each for each in turning if id(each.param) in known]
        asked = [each for each in zero if not each.is_at_rest]
        asked += [e for e in turning if id(e.param) not in known and "radius" not in state.get(e.param, {})]
        self._zero: list[Layers] = [*(each for each in zero if each.is_at_rest), *check_norms(asked)]

        self._scratch: Scratch = scratch or (Scratch() if previous is None else previous._scratch)
        kept = {param: dict(entry) for param, entry in state.items()}
        try:
            self._build(found, states, groups, state, choose)
        except BaseException:
            # The next try would take states made here for such as have taken a gradient.
            for param in list(state):
                if param in kept:
                    state[param].clear()
                    state[param].update(kept[param])
                else:
                    del state[param]
            raise
        self.recorded = False
        #: CUDA graphs read the tables of the plan that they recorded, so it outlives its use here.
        self._kept: list[Plan] = []
        if previous is not None:
            self.carry_counts(previous.counts())
            self._kept = [*previous._kept, *([previous] if previous.recorded else [])]

    def _build(
        self,
        found: Sequence[Member[Backend]],
        states: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]],
        groups: Sequence[Mapping[str, Any]],
        state: State,
        choose: Choose[Backend],
    ) -> None:
        """Publish the states, and make the batches that run on them."""
        spread_out = [member.spread for member in found]
        drop_remainders(groups, state)
        self._groups, self._state = groups, state
        self._signature = _signature(groups)
        self._edition: object | None = None
        self._params = [list(group["params"]) for group in groups]
        member_ids = {id(member.param) for member in found}
        others = [param for _, _, param in labelled(groups) if id(param) not in member_ids]
        self._waiting = [param for param in others if not is_elsewhere(param)]
        self._frozen = [param for param in self._waiting if is_sharded(param)]
        ahead: set[int] = set()
        slots: dict[tuple[Any, ...], list[Slot]] = {}
        kinds: dict[tuple[Any, ...], tuple[Backend, Formula, bool]] = {}
        layout: list[tuple[int, Groups]] = []
        spreads: dict[int, Spread] = {}
        #: Tensors of FakeTensorMode, with their states: there is nothing to compute.
        self._fake: list[tuple[Tensor, list[Tensor]]] = []
        for member, (kept, local), spread in zip(found, states, spread_out, strict=True):
            old = state.get(member.param, {})
            fresh = any(old.get(name) is None for name in member.formula.states)
            # As torch has it, what needs no state has no entry.
            entry = state.setdefault(member.param, {}) if kept else old
            entry.update(kept)
            member.settle(local)
            if member.starts is not None and is_given(member.group):
                ahead.add(id(member.param))
            if is_fake(member.local):
                self._fake.append((member.param, list(local.values())))
                continue
            types = (member.param.dtype, state_dtype(member.param.dtype, member.group), "remainder" in kept)
            lies = (member.local.device, is_sharded(member.param), member.is_shared)
            key = (member.backend.name, member.formula.name, *types, *lies)
            kinds[key] = member.backend, member.formula, member.is_shared
            slots.setdefault(key, []).extend(member.slots(entry, local, fresh, len(layout)))
            if spread is not None:
                spreads[len(layout)] = spread
            if member.sharding.groups:
                # Those of no layer here, too: sums over several dimensions of a mesh need one order everywhere.
                layout.append((member.sharding.layers, member.sharding.groups))
        #: The batches of layers that this process steps alone, and those that others have parts of.
        self._whole: list[Pair] = [
            (backend, batch)
            for key, (backend, formula, is_shared) in kinds.items()
            if not is_shared
            for batch in batches_of(formula, slots[key], backend.tile, self._scratch)
        ]
        shared = [(backend, formula, slots[key]) for key, (backend, formula, is_shared) in kinds.items() if is_shared]
        self._together = Together(shared, layout, spreads, self._scratch) if shared else None
        self.batches: list[Pair] = [*self._whole, *(self._together.pairs if self._together is not None else ())]
        self._learned = learned_radii(batch for _, batch in self.batches)
        if self._together is not None:
            self._together.share(choose, self._learned)
        #: What the radii of layers that were not on their spheres when this was made have been before the last step.
        self.radii_before = {
            (slot.owner, slot.piece.first): slot.radius.clone()
            for _, slot, _ in self.rows()
            if slot.radius is not None and id(slot.owner) in ahead
        }
        self._entries = list(state.values())
        self._retired = WeakTensorKeyDictionary()

    def counts(self) -> dict[tuple[Tensor, int], Tensor]:
        """The counts of every slot that has been stepped, (layers, Count.WIDTH), in this plan or before it."""
        ours = {(slot.owner, slot.piece.first): batch.counts[rows] for batch, slot, rows in self.rows()}
        retired = {(owner, first): count for owner, counts in self._retired.items() for first, count in counts.items()}
        return {**retired, **ours}

    def carry_counts(self, counts: Mapping[tuple[Tensor, int], Tensor]) -> None:
        """Go on counting from these, which :meth:`counts` of another plan returned."""
        retired = dict(counts)
        for batch, slot, rows in self.rows():
            known = retired.pop((slot.owner, slot.piece.first), None)
            if known is not None and len(known) == slot.layers:
                batch.counts[rows] = known.to(batch.counts.device)
        # Weakly: parameters that were replaced would stay in memory as long as the optimizer.
        self._retired = WeakTensorKeyDictionary()
        for (owner, first), count in retired.items():
            self._retired.setdefault(owner, {})[first] = count.clone()

    def rest(self) -> None:
        """Let the statistics say what they do after a step for which no tensor had a gradient."""
        for _, batch in self.batches:
            batch.dots.zero_()
            batch.coefficients[:, Coefficient.MODE] = KEEP

    def rows(self) -> Iterator[tuple[Batch, Slot, slice]]:
        """Every slot with its batch and its rows in the batch's per-layer tables."""
        for _, batch in self.batches:
            for slot, first in zip(batch.slots, batch.first_layers, strict=True):
                yield batch, slot, slice(first, first + slot.layers)

    def holds(self, groups: Sequence[Mapping[str, Any]], state: State, edition: object | None = None) -> bool:
        """Whether the batches still describe the groups, the state and the memory of the parameters.

        ``edition``: of the groups, as :class:`KnownGroups` has it, where :meth:`step` follows at once, on the gradients
        that are there now; None where it may not, and all options are to be compared.
        """
        if groups is not self._groups or state is not self._state:
            return False
        if edition is None or edition is not self._edition:
            self._edition = None
            if _signature(groups) != self._signature:
                return False
            self._edition = edition
        for group, known in zip(groups, self._params, strict=True):
            if not same_objects(group["params"], known):
                return False
        if self._waiting and any(grad is not None for grad in gradients(self._waiting)):
            return False
        # As members() has it: a shard that is unfrozen takes part in the sums, with or without a gradient here.
        if self._frozen and any(param.requires_grad for param in self._frozen):
            return False
        if self._zero and not all(each.is_at_rest for each in self._zero):
            return False
        if self._together is not None and not self._together.holds():
            return False
        # Whose state has been taken away or replaced as a whole, the batches cannot see.
        if not values_are(state, self._entries):
            return False
        for _, batch in self.batches:
            if not (batch.holds() if edition is None else batch.look()):
                self._forget_looks()
                return False
        return True

    def _forget_looks(self) -> None:
        for _, batch in self.batches:
            batch.forget_look()

    def step(self, loss_scale: LossScale | None = None) -> None:
        """Check the gradients of this step, then run every batch."""
        capturing = is_capturing()
        try:
            for _, batch in self.batches:
                batch.take_gradients()
        except BaseException:
            self._forget_looks()
            raise
        if self._fake or modes_are_on():
            self._announce()
        if capturing:
            check_capture(self._groups)
            for batch in self._all_batches():
                batch.check_capture()
            self.recorded = True
        reserve(self.batches, self._together)
        for _, batch in self.batches:
            batch.refresh(loss_scale, capturing, self._edition)
        for learned in self._learned.values():
            learned.refresh(loss_scale, capturing)
        if self.radii_before:
            self._keep_radii()
        take(self._whole, self._finish)
        if self._together is not None:
            self._together.take(loss_scale, capturing, self._finish)

    def _keep_radii(self) -> None:
        """For check_norms: a layer that reaches its sphere in this step was on none before it."""
        now = [
            slot.radius
            for _, slot, _ in self.rows()
            if slot.radius is not None and (slot.owner, slot.piece.first) in self.radii_before
        ]
        if all(each.device.type == "cpu" for each in now) and bool((torch.cat(now) > 0).all()):
            # Elsewhere, to know that all have arrived, the host would have to wait.
            self.radii_before.clear()
        else:
            torch._foreach_copy_(list(self.radii_before.values()), now)

    def _announce(self) -> None:
        """Before anything is written: tell torch's modes what will be."""
        if self.batches:
            check_modes()
        for _, batch in self.batches:
            # Whole tensors, where torch's own operations would show a mode one block after the other.
            announce(_written(batch))
        for param, states in self._fake:
            if param.grad is not None:
                announce([param, *states])

    def _finish(self, backend: Backend, batch: Batch) -> None:
        if backend.writes_unseen:
            batch.count_writes()
        batch.release()
        if batch.learned is not None:
            batch.learned.batch.release()

    def _all_batches(self) -> Iterator[Batch]:
        """With those that only measure."""
        for _, batch in self.batches:
            yield batch
        for learned in self._learned.values():
            yield learned.batch

    def sync_hyperparameters(self, groups: Sequence[Mapping[str, Any]], state: State, stale: bool) -> None:
        """Bring the hyperparameters on the device up to date with the groups.

        Raises RuntimeError, before anything is modified, where a captured step could not follow. ``stale``: this plan
        is to be replaced before the next step.
        """
        same = not stale and groups is self._groups and state is self._state and _signature(groups) == self._signature
        # Graphs of plans before this one go on with the tensors that they recorded, and with the same groups.
        older = [plan for plan in self._kept if plan._groups is groups]
        follow = all(plan._rates_are_recorded() for plan in (*older, self))
        if not follow or (self.recorded and not same):
            raise RuntimeError(
                "a captured CUDA graph cannot follow what was changed since: it runs the same kernels on the same "
                "parameters and state, with lr from the tensor that was there (fill that one in place instead). Undo "
                "the change, or capture the step again after one outside of a capture"
            )
        for plan in (*older, *([self] if same else [])):
            for batch in plan._all_batches():
                batch.sync_hyperparameters()

    def _rates_are_recorded(self) -> bool:
        return all(batch.are_recorded() for _, batch in self.batches)
