"""One tensor ahead of a step, what its numbers are rounded to, and the reference's step of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layca_fast.formulas.bases import Formula
from layca_fast.formulas.options import find_base
from layca_fast.reference import reference_step
from layca_fast.state.compensation import HALVES, compute_dtype, state_dtype
from layca_fast.state.members import rotates


@dataclass
class Before:
    """One tensor ahead of a step: float64 weights and state, its group, what its numbers are stored in."""

    weight: Tensor
    state: dict[str, Tensor]
    group: Mapping[str, Any]
    dtype: torch.dtype
    turns: bool
    formula: Formula

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.dtype)

    @property
    def eps(self) -> float:
        """Half a unit in the last place of what the step is computed in, whatever its results are stored in."""
        unit = torch.finfo(self.compute_dtype).eps
        # The reference has no more digits than float64, so that it is off by as much itself.
        return unit if self.dtype == torch.float64 else unit / 2

    @property
    def directs(self) -> bool:
        """Whether the step is a direction of whole matrices."""
        return self.formula.direct is not None

    @property
    def step_eps(self) -> float:
        """How far rounding takes a direction, in parts of its norm.

        An iteration multiplies what is small by so much: the roundings of its first product, and those of the
        look-ahead that it starts from. A mean that it starts from is taken as it is stored.
        """
        if not self.directs:
            return 0.0
        growth = float(self.group["ns_coefficients"][0] ** self.group["ns_steps"])
        iterated = torch.finfo(torch.float64).eps if self.group["ns_dtype"] == torch.float64 else self.eps
        return growth * max(iterated, self.eps if self.group["nesterov"] else 0.0)

    @property
    def is_rounded(self) -> bool:
        """Whether 16 bits are all that is kept of the weights."""
        return self.dtype in HALVES and self.group["compensate"] is False

    @property
    def floor(self) -> float:
        """What an element may be off by, however small it is: denormal numbers count as zero."""
        if self.dtype == torch.float16:
            return 2.0**-24 if self.is_rounded else 2.0**-39
        return 1e-300 if self.dtype == torch.float64 else 1e-37

    @property
    def signs(self) -> float:
        """Of the gradient in the base step."""
        return -1.0 if self.group["maximize"] else 1.0


def before_step(param: Tensor, weight: Tensor, entry: Mapping[str, Any], group: Mapping[str, Any]) -> Before:
    """``weight``: what the parameter stands for; ``entry``: its state, which may lack what this step will make."""
    formula = find_base(group["base"]).formula(group)
    state = {name: value.detach().double().clone() for name, value in entry.items() if isinstance(value, Tensor)}
    for name, option in find_base(group["base"]).starts.items():
        if name not in state:
            # A new buffer has rounded what it starts with, too.
            start = torch.full_like(weight, group[option], dtype=state_dtype(param.dtype, group))
            state |= {name: start.double(), "step": torch.zeros(())}
    return Before(weight.detach().double().clone(), state, group, param.dtype, rotates(param, group), formula)


class _Kept(dict[str, Any]):
    """The state of a step, of which what it writes is already known: as it was stored, rounded."""

    def __init__(self, state: Mapping[str, Any], stored: Mapping[str, Tensor]) -> None:
        super().__init__(state)
        self._stored = stored

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, self._stored.get(name, value))


@dataclass
class Outcome:
    """What the reference makes of a step."""

    weight: Tensor
    state: dict[str, Any]
    base_step: Tensor


def reference(
    before: Before,
    weight: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    stored: Mapping[str, Tensor] | None = None,
    **changed: Any,
) -> Outcome:
    """The reference on copies. ``changed``: other options of the base.

    ``stored``: the states after the step as they are, rounded, of which the optimizer makes its base step.
    """
    group, known = before.group, [name for name in before.formula.states if name in state]
    ours: dict[str, Any] = {name: state[name].clone() for name in known}
    if stored is not None:
        ours = _Kept(ours, stored)
        if group["base"] == "lion":
            # Its step is made of the mean of before, which the optimizer takes from the one after it.
            keep = group["betas"][1]
            ours = {"exp_avg": (stored["exp_avg"] - (1 - keep) * before.signs * grad) / keep}
    count = int(state["step"]) if before.formula.counts_steps and known else 0
    ours["step"] = count
    if "radius" in state:
        # Below 0 nothing is reached yet.
        ours["radius"] = [value if value > 0 else None for value in state["radius"].tolist()]
    options = {name: changed.get(name, group[name]) for name in find_base(group["base"]).options}
    more = {name: group[name] for name in ("rule", "radius", "joins_at", "weight_decay", "maximize")}
    chunks = group["chunks"] if weight.dim() > 0 and (before.turns or before.directs) else 1
    after = weight.clone(memory_format=torch.contiguous_format)
    rate = float(group["lr"])
    step = reference_step(
        after, grad, ours, lr=rate, base=group["base"], rotate=before.turns, chunks=chunks, **more, **options
    )
    # Adam's alone counts its steps here.
    ours["step"] = count + 1
    return Outcome(after, ours, step)
