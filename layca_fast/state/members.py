"""Which parameters take part in a step, and the state that each of them needs."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic

import torch
from torch import Tensor

from ..compat import is_fake
from ..formulas.bases import FORMULAS, Formula
from ..formulas.options import decays, find_base
from ..messages import describe, labelled
from .checks import (
    check_gradient,
    check_matrices,
    check_memory,
    check_not_flattened,
    check_parameter,
    check_writable,
    cut_for,
)
from .compensation import HALVES, fits, is_compensated, state_dtype
from .contents import check_complete
from .cut import Cut
from .layout import is_vector, layers_are_dense, scalar_device, usable
from .memory import Written
from .modes import check_modes
from .radii import settle, starting_radii
from .runner import Choose, Runs
from .sharding import (
    Piece,
    Sharding,
    is_elsewhere,
    is_sharded,
    local_of,
    placed,
    radius_placements,
    sharding_of,
    wrap,
    wrap_radius,
)
from .slot import Slot
from .spread import Spread, spread_of

State = MutableMapping[Tensor, dict[str, Any]]

#: State that the kernels read; whatever else a checkpoint holds is kept as it is.
OUR_STATES = {"radius", "remainder", "step", *(name for formula in FORMULAS.values() for name in formula.states)}


def rotates(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a tensor of this group rotates; by default those that are no vectors do: (n, 1) is one."""
    rotate = group["rotate"]
    return not is_vector(param) if rotate is None else bool(rotate)


def ignored_decay(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """What to warn of, if a group asks for weight decay of tensors that rotate."""
    for group, label, param in labelled(groups):
        if decays(group) and rotates(param, group):
            return (
                f"weight_decay={group['weight_decay']} is ignored for {describe(label, param)} and every other "
                "tensor that rotates: Layca keeps their norms fixed. Set weight_decay=0 there to silence this"
            )
    return None


@dataclass
class Member(Generic[Runs]):
    """One parameter on its way into a batch; ``local`` is what this process has of it."""

    param: Tensor
    local: Tensor
    sharding: Sharding
    group: Mapping[str, Any]
    label: str
    backend: Runs
    formula: Formula
    rotates: bool
    #: How it is cut into layers; None where it is one, and nobody asks for a matrix.
    cut: Cut | None
    dense: bool
    #: Of each layer, the radius state that it begins with, <= 0: see :func:`starting_radii`. None: 0.
    starts: Sequence[float] | None = None

    @property
    def layers(self) -> int:
        """How many layers it holds."""
        return 1 if self.cut is None else self.cut.layers

    @property
    def is_shared(self) -> bool:
        """Whether a step needs numbers from other processes."""
        return bool(self.sharding.groups and self.sharding.pieces)

    @property
    def spread(self) -> Spread | None:
        """Where the matrices lie that have directions, and that other processes have parts of; None of all else.

        Raises ValueError where this process has another part than the placements say.
        """
        if self.formula.direct is None or self.cut is None or not self.is_shared:
            return None
        return spread_of(self.param, self.sharding, self.cut, describe(self.label, self.param))

    def new_states(self, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The state tensors of this member: those it has, moved to where the parameter is now, and new ones.

        Returns them as the optimizer keeps them and as kernels see them, which differ for a DTensor. Raises ValueError
        where one has another shape than the parameter.
        """
        dtype = state_dtype(self.param.dtype, self.group)
        for name, value in state.items():
            if name in OUR_STATES and isinstance(value, Tensor):
                check_memory(value, f"the state {name!r} of {self.label}")
        old = {name: usable(self._placed(name, state[name])) for name in state if state[name] is not None}
        local = {}
        for name in self.formula.states:
            local[name] = self._buffer(name, old.get(name), dtype)
        if is_compensated(self.param.dtype, self.group):
            local["remainder"] = self._remainder(old.get("remainder"))
        check_complete(self.formula, state, describe(self.label, self.param))
        if self.formula.counts_steps:
            # Another base may have counted steps before these buffers were made.
            has = [name for name in self.formula.states if state.get(name) is not None]
            local["step"] = self._step_count(old.get("step"), has)
        if self.rotates:
            local["radius"] = self._radius(old.get("radius"))
        return {name: self._kept(name, local[name], state.get(name)) for name in local}, local

    def written(self, states: Mapping[str, Tensor]) -> Iterator[Written]:
        """What a step writes to, with what to call it; ``states`` as kernels see them."""
        yield partial(describe, self.label, self.param), self.local
        for name, state in states.items():
            yield partial("the state {!r} of {}".format, name, self.label), state

    def _placed(self, name: str, value: Any) -> Any:
        """The local part of a state, which may come from other shards."""
        if name == "step" or name not in OUR_STATES or not isinstance(value, Tensor):
            return local_of(value) if isinstance(value, Tensor) else value
        expected = torch.Size((self.layers,)) if name == "radius" else self.param.shape
        if not (is_sharded(self.param) or is_sharded(value)):
            return value
        if value.shape != expected:
            # The shape of what lies here could still be that of another tensor's part.
            raise ValueError(self._wrong_shape(name, value))
        lies = radius_placements(self.param, self.sharding) if name == "radius" and is_sharded(self.param) else None
        return placed(value, self.param, lies)

    def _wrong_shape(self, name: str, value: Tensor) -> str:
        start = f"the state {name!r} of {describe(self.label, self.param)} has shape {tuple(value.shape)}"
        if name == "radius":
            return (
                f"{start} for {self.layers} layers: call optimizer.reset_radius() after changing chunks (of an "
                "optimizer that Layca is attached to: del optimizer.state[parameter]['radius'])"
            )
        return f"{start}: clear the optimizer's state for it after changing its shape, del optimizer.state[parameter]"

    def _kept(self, name: str, local: Tensor, old: Tensor | None) -> Tensor:
        if old is not None and local_of(old) is local:
            return old
        if name == "step":
            return local
        if name == "radius":
            return wrap_radius(local, self.param, self.sharding, self.layers)
        return wrap(local, self.param)

    def _buffer(self, name: str, old: Tensor | None, dtype: torch.dtype) -> Tensor:
        # Kernels walk parameter and state as one run of addresses, so their strides must agree.
        form = torch.preserve_format if self.dense else torch.contiguous_format
        if old is None:
            option = find_base(self.group["base"]).starts.get(name)
            start = 0.0 if option is None else float(self.group[option])
            return torch.full_like(self.local, start, dtype=dtype, memory_format=form)
        if old.shape != self.local.shape:
            raise ValueError(self._wrong_shape(name, old))
        if (old.device, old.dtype) == (self.local.device, dtype) and (
            old.stride() == self.local.stride() or not self.dense
        ):
            return old
        return torch.empty_like(self.local, dtype=dtype, memory_format=form).copy_(old)

    def _remainder(self, old: Tensor | None) -> Tensor:
        if old is not None and old.dtype not in HALVES:
            raise ValueError(
                f"the state 'remainder' of {describe(self.label, self.param)} has dtype {old.dtype}: it holds raw bits "
                "in a tensor of the parameter's 16-bit type, which no conversion keeps. Restore it as it was saved, or "
                "drop it: del optimizer.state[parameter]['remainder']"
            )
        # The parameter was cast from another type since: its remainder completed what the cast has rounded.
        kept = old if fits(old, self.param, self.group) else None
        return self._buffer("remainder", kept, self.param.dtype)

    def _step_count(self, old: Any, buffers: Sequence[str]) -> Tensor:
        if not buffers:
            old = 0.0
        # Older versions of torch saved a plain number.
        count = old if isinstance(old, Tensor) else torch.tensor(float(old), dtype=torch.float32, device="cpu")
        if count.shape != ():
            raise ValueError(
                f"the state 'step' of {describe(self.label, self.param)} has shape {tuple(count.shape)}: it must be a "
                "0-d tensor; clear the optimizer's state for it, del optimizer.state[parameter]"
            )
        return count.to(device=self.local.device, dtype=torch.float32)

    def _radius(self, old: Tensor | None) -> Tensor:
        home = scalar_device(self.local.device)
        here = self.sharding.layers
        if old is None:
            return torch.zeros(here, dtype=torch.float64, device=home)
        if old.shape != (here,):
            raise ValueError(self._wrong_shape("radius", old))
        return old.to(device=home, dtype=torch.float64).contiguous()

    def settle(self, local: Mapping[str, Tensor]) -> None:
        """Once the states are the optimizer's, in place: see :func:`layca_fast.state.radii.settle`."""
        radius = local.get("radius")
        if radius is not None and not is_fake(radius):
            first = self.sharding.start
            settle(radius, self.starts and self.starts[first : first + len(radius)])

    def slots(self, entry: Mapping[str, Any], local: Mapping[str, Tensor], fresh: bool, number: int) -> Iterator[Slot]:
        """The places of this member in a batch: one, or one for each piece of a shard that cuts layers."""
        states = [local[name] for name in self.formula.states]
        remainder, radius = local.get("remainder"), local.get("radius")
        # A shard without any layer takes part as an empty tensor that does not rotate: its steps are counted.
        pieces = self.sharding.pieces or (Piece(0, 0),)
        counted = next((piece for piece in pieces if piece.of(self.local).numel() > 0), pieces[0])
        for piece in pieces:
            step = local.get("step")
            if step is not None and piece is not counted:
                # The pieces of a tensor have taken as many steps, and each kernel counts for itself.
                step = step.clone()
            yield Slot(
                param=piece.of(self.local),
                group=self.group,
                base=find_base(self.group["base"]),
                label=self.label,
                states=tuple(piece.of(state) for state in states),
                step=step,
                radius=piece.radii_of(radius) if radius is not None and self.sharding.pieces else None,
                layers=max(piece.layers, 1),
                dense=self.dense,
                fresh=fresh,
                entry=entry,
                remainder=None if remainder is None else piece.of(remainder),
                whole=self.param if is_sharded(self.param) or piece.is_view else None,
                piece=piece,
                cut=self.cut,
                start=self.sharding.start,
                number=number,
            )


def members(
    groups: Sequence[Mapping[str, Any]], state: State, stepped: Set[int], choose: Choose[Runs]
) -> Iterator[Member[Runs]]:
    """Every parameter that has a gradient, or all the state that it needs, checked. Modifies nothing.

    And every trainable DTensor: what is summed over processes must not depend on which gradients this one has.
    ``choose`` finds what steps a tensor. ``stepped``: the ids of those that the plan before had. Of the ones that need
    no state these count as well.
    """
    check_not_flattened()
    for group, label, param in labelled(groups):
        if is_elsewhere(param):
            continue
        formula, turning = find_base(group["base"]).formula(group), rotates(param, group)
        needed = (*formula.states, *(("step",) * formula.counts_steps), *(("radius",) * turning))
        needed += ("remainder",) * is_compensated(param.dtype, group)
        has = state.get(param, {})
        takes_part = param.grad is not None or (is_sharded(param) and param.requires_grad)
        # What needs no state stays from plan to plan: a bias whose gradient comes and goes would change it every time.
        settled = all(has.get(name) is not None for name in needed) and (needed or id(param) in stepped)
        if not takes_part and not settled:
            continue
        check_parameter(param, label)
        check_memory(param, label)
        check_writable(param, label)
        if param.grad is not None:
            check_gradient(param.grad, param, label)
        check_matrices(param, group, label)
        # Matrices have directions of their own, whether they rotate or not.
        layered = turning or formula.direct is not None
        cut = cut_for(param, group, label) if layered else None
        local, sharding = local_of(param), Sharding(1, (Piece(0, 1),))
        if cut is not None:
            sharding = sharding_of(param, cut, describe(label, param))
        dense = all(layers_are_dense(piece.of(local), piece.layers) for piece in sharding.pieces)
        backend = choose(group["backend"], local.device)
        if is_fake(local) and backend.writes_unseen:
            if group["backend"] != "auto":
                raise ValueError(
                    f"{describe(label, param)} is a FakeTensor, without memory that backend={backend.name!r} could "
                    "write to: use backend='auto' or 'torch', which try a step out without numbers"
                )
            backend = choose("torch", local.device)
        if not is_fake(local):
            check_modes()
        if not dense and backend.needs_dense:
            if group["backend"] != "auto":
                raise ValueError(
                    f"{describe(label, param)} with strides {local.stride()} and chunks={group['chunks']!r} is not "
                    f"laid out layer after layer in one run of memory, which backend={backend.name!r} needs: use "
                    f"backend='auto' or 'torch', or {_stored_well(cut)}"
                )
            backend = choose("torch", local.device)
        starts = starting_radii(param, group, cut, label) if turning and cut is not None else None
        yield Member(param, local, sharding, group, label, backend, formula, turning, cut, dense, starts)


def _stored_well(cut: Cut | None) -> str:
    if cut is not None and cut.turned:
        return (
            "store it with its columns one after the other, torch.nn.Parameter(weight.mT.contiguous().mT) of a matrix"
        )
    return "make the parameter contiguous"


def drop_remainders(groups: Sequence[Mapping[str, Any]], state: State) -> None:
    """Those of a time when the parameter had another type, or was compensated: they would complete other weights."""
    for group, _, param in labelled(groups):
        has = state.get(param, {})
        if not fits(has.get("remainder"), param, group):
            has.pop("remainder", None)
            if not has and param in state:
                del state[param]
