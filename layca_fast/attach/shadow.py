"""The rotating weights of somebody else's optimizer: copies from before its step, and the plan that turns them after.

The plan is the one of :class:`layca_fast.FusedLayca` under base "sgd", on aliases of the parameters whose gradient is
the step that the other optimizer has just made.
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
from ..compat import is_fake
from ..formulas.bases import BASES
from ..formulas.options import check_groups
from ..messages import describe, labelled
from ..state.checks import check_parameter, check_writable, count_layers
from ..state.compensation import HALVES
from ..state.layout import is_dense, memory_order
from ..state.members import rotates
from ..state.memory import check_apart, is_trained
from ..state.others import option
from ..state.sharding import is_sharded, local_of
from ..state.structure import check_entries
from ..step.hypers import DIFFERENCE
from ..step.interrupts import uninterrupted
from ..step.plan import Plan
from ..step.watch import Layouts

#: What a param group may say for itself; where it does not, the arguments of ``attach`` hold.
OPTIONS = ("rule", "rotate", "chunks", "radius", "joins_at", "backend")

#: Elements per exchange of weights and copies: what stays in a CPU's cache; enough for one launch to fill a GPU.
BLOCK_ON_CPU, BLOCK_ELSEWHERE = 2**18, 2**22

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
    if not param.requires_grad and param.grad is None:
        return False
    # A lazy parameter has no dimensions to count yet.
    return group["rotate"] is not False if is_lazy(param) else rotates(param, group)


def turning(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str, Tensor]]:
    """Every parameter that is to rotate, once, with its group and label."""
    found = {id(param): (group, label, param) for group, label, param in labelled(groups) if _turns(param, group)}
    return list(found.values())


def check_turning(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise TypeError or ValueError, naming it, for a parameter that is to rotate and cannot."""
    for group, label, param in turning(groups):
        check_parameter(param, label)
        check_writable(param, label)
        if is_sharded(param):
            raise TypeError(
                f"{describe(label, param)} is a DTensor: attach() turns plain tensors only; train sharded models with "
                "FusedLayca, or put its group's rotate to False"
            )
        if param.dtype in HALVES:
            raise TypeError(
                f"{describe(label, param)}: attach() reads the other optimizer's step from the weights, and most of it "
                "is lost where they are stored in 16 bits; use FusedLayca, which keeps the rest of their bits, or keep "
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


def _pieces(weight: Tensor, kept: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of both, at most ``block`` elements each; of tensors with gaps in memory, at least one row."""
    if weight.numel() == 0:
        return
    if is_dense(weight):
        weight, kept, rows = memory_order(weight), memory_order(kept), block
    else:
        rows = max(1, block * weight.shape[0] // weight.numel())
    yield from zip(weight.split(rows), kept.split(rows), strict=True)


class _Exchange:
    """Puts weights back and leaves the step in their copies, piece by piece through a scratch per device and dtype."""

    def __init__(self, weights: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        pieces: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for weight, kept in zip(weights, copies, strict=True):
            block = BLOCK_ON_CPU if weight.device.type == "cpu" else BLOCK_ELSEWHERE
            pieces.setdefault((weight.device, weight.dtype), []).extend(_pieces(weight, kept, block))
        self._bundles: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
        for (device, dtype), pairs in pieces.items():
            self._bundle(pairs, BLOCK_ON_CPU if device.type == "cpu" else BLOCK_ELSEWHERE, device, dtype)

    def _bundle(
        self, pairs: Sequence[tuple[Tensor, Tensor]], block: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Small pieces share a bundle, which a GPU exchanges in three launches."""
        bundles: list[list[tuple[Tensor, Tensor]]] = []
        filled, largest = block, 0
        for weight, kept in pairs:
            if filled + weight.numel() > block:
                bundles.append([])
                filled = 0
            bundles[-1].append((weight, kept))
            filled += weight.numel()
            largest = max(largest, filled)
        scratch = torch.empty(largest, dtype=dtype, device=device)
        for bundle in bundles:
            weights, copies = [weight for weight, _ in bundle], [kept for _, kept in bundle]
            parts = scratch[: sum(weight.numel() for weight in weights)].split([weight.numel() for weight in weights])
            views = [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
            self._bundles.append((weights, copies, views))

    def run(self) -> None:
        for weights, copies, scratch in self._bundles:
            torch._foreach_copy_(scratch, weights)
            torch._foreach_copy_(weights, copies)
            torch._foreach_sub_(copies, scratch)


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
        self._lie = Layouts([local_of(param) for _, param in written if not is_fake(param)])
        self._made_for = _structure(groups)
        old = {} if previous is None else {id(param): alias.grad for param, alias in previous.pairs}
        if previous is not None:
            previous._drop()
        self.pairs: list[tuple[Tensor, Tensor]] = [(param, param.detach()) for _, _, param in turning(groups)]
        # They have no addresses, and torch warns of being asked.
        self._are_fake = any(is_fake(param) for param, _ in self.pairs)
        for param, alias in self.pairs:
            alias.grad = _copy_of(param, old.pop(id(param), None))
        aliases = {id(param): alias for param, alias in self.pairs}
        # Stands for every tensor that does not rotate. It has no gradient, so the plan leaves it out.
        absent = torch.empty(0, dtype=torch.float32, device="cpu")
        self.groups = groups
        for group in groups:
            group["params"] = [aliases.pop(id(param), absent) for param in group["params"]]
        self._state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._published: set[Tensor] = set()
        self.plan: Plan | None = None
        self._weights = [alias for _, alias in self.pairs]
        self._copies = [alias.grad for alias in self._weights if alias.grad is not None]
        self._exchange = _Exchange(self._weights, self._copies)
        self._take_plan(optimizer)

    def _drop(self) -> None:
        """Let the copies go: those of a shadow that replaces this one are to take their place in memory."""
        self._exchange, self._copies = _Exchange([], []), []
        for _, alias in self.pairs:
            alias.grad = None

    def fits(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether parameters, their memory and the options are still those that this was made for."""
        return (
            _structure(groups) == self._made_for
            and self._lie.hold()
            and all(
                (self._are_fake or param.data_ptr() == alias.data_ptr())
                and param.stride() == alias.stride()
                and param.shape == alias.shape
                and param.dtype == alias.dtype
                and param.device == alias.device
                for param, alias in self.pairs
            )
        )

    def keep(self, optimizer: Optimizer) -> None:
        """Before the step: copy the weights. Raises, before that, what the plan finds wrong with them."""
        self._take_plan(optimizer)
        if self._weights:
            torch._foreach_copy_(self._copies, self._weights)

    def take_rates(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Turn by the learning rates of ``groups`` from now on."""
        for ours, theirs in zip(self.groups, groups, strict=True):
            ours["lr"] = theirs["lr"]

    def turn(self, optimizer: Optimizer) -> None:
        """After the step: put the weights back, turn them by the step that was made, and store new radii."""
        self._exchange.run()
        assert self.plan is not None
        self.plan.step()
        for param, alias in self.pairs:
            # Optimizers make their state at a parameter's first gradient, and only where it has none yet.
            if param.grad is not None or optimizer.state.get(param):
                optimizer.state.setdefault(param, {})["radius"] = self._state[alias]["radius"]
                self._published.add(alias)

    def _take_plan(self, optimizer: Optimizer) -> None:
        """Bring radii, which may have been loaded or deleted, and the plan up to date."""
        for param, alias in self.pairs:
            theirs, ours = optimizer.state.get(param, {}).get("radius"), self._state[alias]
            if theirs is not None and theirs is not ours.get("radius"):
                ours["radius"] = theirs
            elif theirs is None and alias in self._published:
                ours.pop("radius", None)
                self._published.remove(alias)
        if self.plan is None or not self.plan.holds(self.groups, self._state):
            with uninterrupted():
                self.plan = Plan(self.groups, self._state, choose, previous=self.plan)
