"""The rotating weights of somebody else's optimizer: copies from before its step, and the plan that turns them after.

The plan is the one of :class:`layca_fast.FusedLayca` under base "sgd", on aliases of the parameters whose gradient is
the step that the other optimizer has just made. So shards, remainders and radii are its affair.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..backends import choose
from ..compat import GRADIENTS_HAVE_TYPES, is_fake, is_fsdp1
from ..formulas.bases import BASES
from ..formulas.options import check_groups
from ..messages import describe, labelled
from ..state.attached import ATTACHED
from ..state.checks import check_parameter, check_writable, count_layers
from ..state.members import rotates
from ..state.memory import check_apart, is_trained
from ..state.others import option
from ..state.sharding import is_elsewhere, is_sharded, local_of, wrap
from ..state.structure import check_entries
from ..step.hypers import DIFFERENCE
from ..step.interrupts import uninterrupted
from ..step.plan import Plan
from ..step.watch import Layouts
from .exchange import Exchange
from .halves import Master, is_half, narrowed, widened
from .stand_in import without_ours

#: What a param group may say for itself; where it does not, the arguments of ``attach`` hold.
OPTIONS = ("rule", "rotate", "chunks", "radius", "joins_at", "backend")

#: The base step is taken as it is: it plays the gradient of plain SGD.
_AS_IT_IS: Mapping[str, Any] = {
    "base": "sgd",
    "weight_decay": 0.0,
    "maximize": False,
    "capturable": False,
    DIFFERENCE: True,
    "radius_lr": 0.0,
    "compensate": None,
    "state_dtype": None,
    **BASES["sgd"].options,
}


def plan_groups(optimizer: Optimizer, defaults: Mapping[str, Any], step: int = 0) -> list[dict[str, Any]]:
    """The param groups of ``optimizer`` as a plan reads them, still with its own parameters.

    Raises TypeError or ValueError for options that are unknown or out of range, or a group without lr; with the number
    of the ``step`` before which they are asked for, if there is one.
    """
    groups = []
    for number, theirs in enumerate(optimizer.param_groups):
        if "lr" not in theirs:
            raise ValueError(
                f"group {number} of {type(optimizer).__name__} has no 'lr', the rate to turn by: set "
                f"optimizer.param_groups[{number}]['lr'], or train these parameters with FusedLayca"
            )
        options = {name: option(optimizer, theirs, name, defaults[name]) for name in OPTIONS}
        ours = {**_AS_IT_IS, **options, "lr": theirs["lr"], "params": theirs["params"]}
        ours["chunk_names"] = option(optimizer, theirs, "chunk_names", None)
        if "param_names" in theirs:
            ours["param_names"] = theirs["param_names"]
        if ours["radius"] == "learned":
            raise ValueError(
                "radius='learned': radii follow the gradient, and attach() knows the other optimizer's step alone: "
                "train with FusedLayca, or choose 'initial' or 'current'"
            )
        groups.append(ours)
    check_groups(groups, step)
    return groups


def _turns(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the tensor rotates and may move: frozen ones are not worth a copy."""
    if (not param.requires_grad and param.grad is None) or is_elsewhere(param):
        return False
    # A lazy parameter has no dimensions to count yet.
    return group["rotate"] is not False if is_lazy(param) else rotates(param, group)


def turning(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str, Tensor]]:
    """Every parameter that is to rotate, once, with its group and label."""
    found = {id(param): (group, label, param) for group, label, param in labelled(groups) if _turns(param, group)}
    return list(found.values())


def check_turning(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise TypeError or ValueError, naming it, for a parameter that is to rotate and cannot."""
    for group, label, param in labelled(groups):
        if is_fsdp1(param) and group["rotate"] is not False:
            # Vectors, of which nothing would turn.
            check_parameter(param, label)
    for group, label, param in turning(groups):
        check_parameter(param, label)
        check_writable(param, label)
        if is_half(param) and not GRADIENTS_HAVE_TYPES:
            # The step, in float32, plays the gradient.
            raise TypeError(
                f"{describe(label, param)}: attach() turns 16-bit parameters by float32 steps, which tensors of torch "
                f"{torch.__version__} cannot have as their gradients: use torch 2.10 or newer, or FusedLayca, or keep "
                "the parameters in float32 and let torch.autocast run the model in 16 bits"
            )
        count_layers(param, group["chunks"], label)


def _structure(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """All that the shadow follows from, beside the memory of the parameters."""
    return [
        (*(group[name] for name in OPTIONS), [(id(param), _turns(param, group)) for param in group["params"]])
        for group in groups
    ]


def _copy_of(param: Tensor, old: Tensor | None) -> Tensor:
    """A copy of the weights, laid out as they are; or ``old``, in the memory that it has, if that is a copy of them."""
    if old is None or old.shape != param.shape:
        old = param.detach()
    elif (old.dtype, old.device, old.stride()) == (param.dtype, param.device, param.stride()):
        return old
    # Strides of gapless tensors are kept exactly, so that kernels walk weights and step as one run of addresses.
    return torch.empty_like(param, requires_grad=False).copy_(old)


class Shadow:
    """Aliases of the weights that rotate, which share their memory, with a copy of each as the alias's gradient.

    ``optimizer`` is only read at construction; ``previous``, the shadow that this one replaces, gives its copies.
    Raises TypeError or ValueError, before anything is modified, for parameters that cannot rotate.
    """

    def __init__(
        self, optimizer: Optimizer, groups: Sequence[dict[str, Any]], previous: "Shadow | None" = None
    ) -> None:
        check_turning(groups)
        check_entries(groups, optimizer.state)
        # A layer that shares memory with what does not rotate would lose its norm as well.
        written = [(label, param) for _, label, param in labelled(groups) if is_trained(param)]
        check_apart([(partial(describe, label, param), local_of(param)) for label, param in written])
        self._lie = Layouts([local_of(param) for _, param in written if not is_fake(local_of(param))])
        self._made_for = _structure(groups)
        old = {} if previous is None else {id(param): kept for (param, _), kept in previous._kept()}
        if previous is not None:
            previous._drop()
        self.pairs: list[tuple[Tensor, Tensor]] = [(param, param.detach()) for _, _, param in turning(groups)]
        self._still = [param for group, _, param in labelled(groups) if is_half(param) and not _turns(param, group)]
        # They have no addresses, and torch warns of being asked.
        self._are_fake = any(is_fake(local_of(param)) for param, _ in self.pairs)
        self._masters = {param: Master(param, alias) for param, alias in self.pairs if is_half(param)}
        copied = [(param, alias) for param, alias in self.pairs if param not in self._masters]
        self._weights = [local_of(alias) for _, alias in copied]
        self._copies = [
            _copy_of(weight, old.pop(id(param), None)) for (param, _), weight in zip(copied, self._weights, strict=True)
        ]
        for (param, alias), kept in zip(copied, self._copies, strict=True):
            alias.grad = wrap(kept, param)
        aliases = {id(param): alias for param, alias in self.pairs}
        # Stands for every tensor that does not rotate. It has no gradient, so the plan leaves it out.
        absent = torch.empty(0, dtype=torch.float32, device="cpu")
        self.groups = groups
        for group in groups:
            group["params"] = [aliases.pop(id(param), absent) for param in group["params"]]
        self._state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._published: set[Tensor] = set()
        self.plan: Plan | None = None
        self._exchange = Exchange(self._weights, self._copies)
        self._take_plan(optimizer)

    def _kept(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """The pairs of which there are copies, with them."""
        copied = (pair for pair in self.pairs if pair[0] not in self._masters)
        return zip(copied, self._copies, strict=False)

    def _drop(self) -> None:
        """Let the copies go: those of a shadow that replaces this one are to take their place in memory."""
        self._exchange, self._copies = Exchange([], []), []
        for master in self._masters.values():
            master.drop()
        for _, alias in self.pairs:
            alias.grad = None

    def fits(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether parameters, their memory and the options are still those that this was made for."""
        return (
            _structure(groups) == self._made_for
            and self._lie.hold()
            and all(self._lies_as(local_of(param), local_of(alias)) for param, alias in self.pairs)
        )

    def _lies_as(self, param: Tensor, alias: Tensor) -> bool:
        return (
            (self._are_fake or param.data_ptr() == alias.data_ptr())
            and param.stride() == alias.stride()
            and param.shape == alias.shape
            and param.dtype == alias.dtype
            and param.device == alias.device
        )

    def keep(self, optimizer: Optimizer) -> None:
        """Before the step: copy the weights. Raises, before that, what the plan finds wrong with them."""
        self._take_plan(optimizer)
        self._settle(optimizer)
        if self._weights:
            torch._foreach_copy_(self._copies, self._weights)

    def needs_stand_in(self, optimizer: Optimizer) -> bool:
        """Whether another has to take the step, because of types, or of states that would not look unmade."""
        if self._masters:
            return True
        return any(is_sharded(param) and not without_ours(optimizer.state.get(param, {})) for param, _ in self.pairs)

    def fill(self) -> tuple[dict[Tensor, Tensor], set[Tensor]]:
        """The float32 weights that stand in for 16-bit parameters, as these are now; and all that turns."""
        weights: dict[Tensor, Tensor] = {
            param: self._masters[param].fill(self._state[alias]["remainder"])
            for param, alias in self.pairs
            if param in self._masters
        }
        return weights, {param for param, _ in self.pairs}

    def take_rates(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Turn by the learning rates of ``groups`` from now on."""
        for ours, theirs in zip(self.groups, groups, strict=True):
            ours["lr"] = theirs["lr"]

    def turn(self, optimizer: Optimizer, stepped: Mapping[Tensor, Tensor]) -> None:
        """After the step: put the weights back, turn them by the step that was made, and store new radii.

        ``stepped``: what the optimizer has made of the weights that stood in for 16-bit parameters.
        """
        self._exchange.run()
        for param, alias in self.pairs:
            if param in self._masters:
                self._masters[param].take(stepped.get(param), self._state[alias]["remainder"])
        assert self.plan is not None
        self.plan.step()
        for param, alias in self.pairs:
            self._publish(optimizer, param, alias)

    def _settle(self, optimizer: Optimizer) -> None:
        """What has to be in the optimizer's state before a step, which may fail."""
        for param, alias in self.pairs:
            if param not in self._masters and "remainder" in optimizer.state.get(param, {}):
                # Of a time when the parameter had 16 bits.
                del optimizer.state[param]["remainder"]
            # Shards: whether layers of zeros were looked for, in which all take part, must not hang on who has a
            # gradient. 16 bits: from now on their state is that of float32 weights.
            if is_sharded(param) or param in self._masters:
                self._publish(optimizer, param, alias)
        for param in self._still:
            entry = optimizer.state.get(param, {})
            if "remainder" in entry and param.grad is not None:
                del entry["remainder"]
                entry.update(narrowed(entry, param))

    def _publish(self, optimizer: Optimizer, param: Tensor, alias: Tensor) -> None:
        """Put what we keep of a parameter into the optimizer's state."""
        # Optimizers make their state at a parameter's first gradient, and only where it has none yet.
        entry = optimizer.state.get(param)
        if param.grad is None and not entry and not is_sharded(param):
            return
        if entry is None:
            entry = optimizer.state[param] = {}
        if param in self._masters and "remainder" not in entry:
            entry.update(widened(entry, param))
        ours = self._state[alias]
        for name in self._names(param):
            entry[name] = ours[name]
        self._published.add(alias)

    def _names(self, param: Tensor) -> Sequence[str]:
        """What we keep of a parameter."""
        return ATTACHED if param in self._masters else ("radius",)

    def _take_plan(self, optimizer: Optimizer) -> None:
        """Bring radii and remainders, which may have been loaded or deleted, and the plan up to date."""
        for param, alias in self.pairs:
            entry, ours = optimizer.state.get(param, {}), self._state[alias]
            for name in self._names(param):
                theirs = entry.get(name)
                if theirs is not None and theirs is not ours.get(name):
                    ours[name] = theirs
                elif theirs is None and alias in self._published:
                    ours.pop(name, None)
            if not ours.keys() & entry.keys():
                self._published.discard(alias)
        if self.plan is None or not self.plan.holds(self.groups, self._state):
            with uninterrupted():
                self.plan = Plan(self.groups, self._state, choose, previous=self.plan)
