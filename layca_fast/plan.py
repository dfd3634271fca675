"""From param groups to batches: which tensors are stepped, by which backend, with which state."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .backends import choose
from .backends.base import Backend
from .bases import Formula
from .batch import Batch, Slot, scalar_device
from .capture import check_capture, is_capturing
from .checks import (
    check_gradient,
    check_memory,
    check_parameter,
    count_layers,
    describe,
    find_base,
    have_zero_layers,
    labelled,
)
from .compensation import is_compensated, state_dtype
from .formulas import KEEP
from .layout import layers_are_dense
from .tables import Coefficient
from .unscaling import LossScale
from .watch import gradients, same_objects

State = MutableMapping[Tensor, dict[str, Any]]


def rotates(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a tensor of this group rotates; by default those of two or more dimensions do."""
    rotate = group["rotate"]
    return param.dim() >= 2 if rotate is None else bool(rotate)


@dataclass
class _Member:
    """One parameter on its way into a batch."""

    param: Tensor
    group: Mapping[str, Any]
    label: str
    backend: Backend
    formula: Formula
    rotates: bool
    layers: int
    dense: bool

    def new_states(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state tensors of this member: those it has, moved to where the parameter is now, and new ones.

        Raises ValueError where one has another shape than the parameter.
        """
        dtype = state_dtype(self.param.dtype, self.group)
        tensors = {}
        for name in self.formula.states:
            tensors[name] = self._buffer(name, state.get(name), dtype)
        if is_compensated(self.param.dtype, self.group):
            tensors["remainder"] = self._remainder(state.get("remainder"))
        if self.formula.counts_steps:
            # Another base may have counted steps before these buffers were made.
            has = [name for name in self.formula.states if state.get(name) is not None]
            tensors["step"] = self._step_count(state.get("step"), has)
        if self.rotates:
            tensors["radius"] = self._radius(state.get("radius"))
        return tensors

    def _buffer(self, name: str, old: Tensor | None, dtype: torch.dtype) -> Tensor:
        # Kernels walk parameter and state as one run of addresses, so their strides must agree.
        form = torch.preserve_format if self.dense else torch.contiguous_format
        if old is None:
            option = find_base(self.group["base"]).starts.get(name)
            start = 0.0 if option is None else float(self.group[option])
            return torch.full_like(self.param, start, dtype=dtype, memory_format=form)
        if old.shape != self.param.shape:
            raise ValueError(
                f"the state {name!r} of {describe(self.label, self.param)} has shape {tuple(old.shape)}: "
                "clear the optimizer's state for it after changing its shape, del optimizer.state[parameter]"
            )
        if (old.device, old.dtype) == (self.param.device, dtype) and (
            old.stride() == self.param.stride() or not self.dense
        ):
            return old
        return torch.empty_like(self.param, dtype=dtype, memory_format=form).copy_(old)

    def _remainder(self, old: Tensor | None) -> Tensor:
        if old is not None and old.dtype != torch.bfloat16:
            raise ValueError(
                f"the state 'remainder' of {describe(self.label, self.param)} has dtype {old.dtype}: it holds raw bits "
                "in a bfloat16 tensor, which no conversion keeps. Restore it as it was saved, or drop it: "
                "del optimizer.state[parameter]['remainder']"
            )
        return self._buffer("remainder", old, torch.bfloat16)

    def _step_count(self, old: Any, buffers: Sequence[str]) -> Tensor:
        if not buffers:
            old = 0.0
        if old is None:
            raise ValueError(
                f"the state of {describe(self.label, self.param)} has {buffers[0]!r} but no 'step', the number of "
                "steps that made it: set it, or clear the optimizer's state for it, del optimizer.state[parameter]"
            )
        # Older versions of torch saved a plain number.
        count = old if isinstance(old, Tensor) else torch.tensor(float(old), device="cpu")
        if count.shape != ():
            raise ValueError(
                f"the state 'step' of {describe(self.label, self.param)} has shape {tuple(count.shape)}: it must be a "
                "0-d tensor; clear the optimizer's state for it, del optimizer.state[parameter]"
            )
        return count.to(device=self.param.device, dtype=torch.float32)

    def _radius(self, old: Tensor | None) -> Tensor:
        home = scalar_device(self.param.device)
        if old is None:
            return torch.zeros(self.layers, dtype=torch.float64, device=home)
        if old.shape != (self.layers,):
            raise ValueError(
                f"the state 'radius' of {describe(self.label, self.param)} has shape {tuple(old.shape)} for "
                f"{self.layers} layers: call optimizer.reset_radius() after changing chunks (of an optimizer that "
                "Layca is attached to: del optimizer.state[parameter]['radius'])"
            )
        return old.to(device=home, dtype=torch.float64).contiguous()


def _members(groups: Sequence[Mapping[str, Any]], state: State) -> Iterator[_Member]:
    """Every parameter that has a gradient, or all the state that it needs, checked. Modifies nothing."""
    for group, label, param in labelled(groups):
        formula, turning = find_base(group["base"]).formula(group), rotates(param, group)
        needed = (*formula.states, *(("step",) * formula.counts_steps), *(("radius",) * turning))
        has = state.get(param, {})
        if param.grad is None and (not needed or any(has.get(name) is None for name in needed)):
            continue
        check_parameter(param, label)
        check_memory(param, label)
        if param.grad is not None:
            check_gradient(param.grad, param, label)
        layers = count_layers(param, group["chunks"], label) if turning else 1
        dense = layers_are_dense(param, layers)
        backend = choose(group["backend"], param.device)
        if not dense and backend.needs_dense:
            if group["backend"] != "auto":
                raise ValueError(
                    f"{describe(label, param)} with strides {param.stride()} and chunks={group['chunks']!r} is not "
                    f"laid out layer after layer in one run of memory, which backend={backend.name!r} needs: use "
                    "backend='auto' or 'torch', or make the parameter contiguous"
                )
            backend = choose("torch", param.device)
        yield _Member(param, group, label, backend, formula, turning, layers, dense)


def _check_norms(members: Sequence[_Member]) -> None:
    """Raise ValueError if a layer's weights are all zero: it has no direction to turn. Waits for the device."""
    flags = have_zero_layers([(member.param, member.layers) for member in members])
    zero = [member for member, flag in zip(members, flags, strict=True) if flag]
    if zero:
        names = ", ".join(describe(member.label, member.param) for member in zero)
        raise ValueError(
            f"all weights of a layer are zero in {names}: such a layer has no direction to turn. Put these parameters "
            "in a group with rotate=False, or initialize them"
        )


def _signature(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """All that fixes the structure of the batches, beside the tensors themselves."""
    return [
        (
            id(group),
            find_base(group["base"]).formula(group).name,
            group["base"],
            group["rule"],
            group["rotate"],
            group["chunks"],
            group["radius"],
            group["backend"],
            bool(group["weight_decay"]),
            group["compensate"],
            group["state_dtype"],
        )
        for group in groups
    ]


class Plan:
    """The batches for the parameters that have a gradient or had one before, and the state that they need.

    Building it checks everything, then creates the missing state in ``state``; nothing is modified if a check fails.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: State, previous: "Plan | None" = None) -> None:
        if is_capturing():
            check_capture(groups)
            raise RuntimeError(
                "the step being captured would have to create or change state: take a step before the capture, with "
                "gradients for the same parameters (one at lr = 0 moves nothing)"
            )
        members = list(_members(groups, state))
        states = [member.new_states(state.get(member.param, {})) for member in members]
        _check_norms([m for m in members if m.rotates and "radius" not in state.get(m.param, {})])

        self._groups, self._state = groups, state
        self._signature = _signature(groups)
        self._params = [list(group["params"]) for group in groups]
        member_ids = {id(member.param) for member in members}
        self._waiting = [param for _, _, param in labelled(groups) if id(param) not in member_ids]
        slots: dict[tuple[Any, ...], list[Slot]] = {}
        self._formulas: dict[tuple[Any, ...], tuple[Backend, Formula]] = {}
        for member, tensors in zip(members, states, strict=True):
            old = state.get(member.param, {})
            fresh = any(old.get(name) is None for name in member.formula.states)
            if tensors:
                state[member.param].update(tensors)
            if "remainder" not in tensors:
                # Of a time when the parameter had 16 bits: later it would complete other weights.
                old.pop("remainder", None)
            slot = Slot(
                param=member.param,
                group=member.group,
                base=find_base(member.group["base"]),
                label=member.label,
                states=tuple(tensors[name] for name in member.formula.states),
                step=tensors.get("step"),
                radius=tensors.get("radius"),
                layers=member.layers,
                dense=member.dense,
                fresh=fresh,
                entry=state[member.param] if tensors else {},
                remainder=tensors.get("remainder"),
            )
            types = (member.param.dtype, state_dtype(member.param.dtype, member.group), "remainder" in tensors)
            key = (member.backend.name, member.param.device, *types, member.formula.name)
            self._formulas[key] = member.backend, member.formula
            slots.setdefault(key, []).append(slot)
        self.batches = [
            (backend, Batch(formula, slots[key], backend.tile)) for key, (backend, formula) in self._formulas.items()
        ]
        self._entries = list(state.values())
        self._retired: dict[Tensor, Tensor] = {}
        self.recorded = False
        #: CUDA graphs read the tables of the plan that they recorded, so it outlives its use here.
        self._kept: list[Plan] = []
        if previous is not None:
            self.carry_counts(previous.counts())
            self._kept = [*previous._kept, *([previous] if previous.recorded else [])]

    def counts(self) -> dict[Tensor, Tensor]:
        """The counts of every tensor that has been stepped, (layers, Count.WIDTH), in this plan or before it."""
        return {**self._retired, **{slot.param: batch.counts[rows] for batch, slot, rows in self.rows()}}

    def carry_counts(self, counts: Mapping[Tensor, Tensor]) -> None:
        """Go on counting from these, (layers, Count.WIDTH) for each tensor that has been stepped before."""
        self._retired = dict(counts)
        for batch, slot, rows in self.rows():
            known = self._retired.get(slot.param)
            if known is not None and len(known) == slot.layers:
                batch.counts[rows] = known.to(batch.counts.device)

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

    def holds(self, groups: Sequence[Mapping[str, Any]], state: State) -> bool:
        """Whether the batches still describe the groups, the state and the memory of the parameters."""
        if groups is not self._groups or state is not self._state:
            return False
        if _signature(groups) != self._signature:
            return False
        if not all(same_objects(group["params"], known) for group, known in zip(groups, self._params, strict=True)):
            return False
        if any(grad is not None for grad in gradients(self._waiting)):
            return False
        # Whose state has been taken away or replaced as a whole, the batches cannot see.
        entries = list(state.values())
        return same_objects(entries, self._entries) and all(batch.holds() for _, batch in self.batches)

    def step(self, loss_scale: LossScale | None = None) -> None:
        """Check the gradients of this step, then run every batch."""
        capturing = is_capturing()
        for _, batch in self.batches:
            batch.take_gradients()
        if capturing:
            check_capture(self._groups)
            for _, batch in self.batches:
                batch.check_capture()
            self.recorded = True
        for backend, batch in self.batches:
            batch.refresh(loss_scale, capturing)
            backend.step(batch)
            if backend.writes_unseen:
                # Autograd then knows that graphs which saved these weights are out of date.
                increment_version(batch.stepped)
            batch.release()

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
            for _, batch in plan.batches:
                batch.sync_hyperparameters()

    def _rates_are_recorded(self) -> bool:
        return all(batch.hyperparameters.are_recorded() for _, batch in self.batches)
