"""What a step must make of one tensor, by the float64 reference, and how far from that its type lets it be.

The comparison is of single steps, each from the weights and the state that the step before has left, so that errors do
not add up and no chaos needs a wide tolerance. Where a tensor is further off than rounding usually takes it, the
reference itself says how ill-conditioned the step is: it is run again on inputs that are changed by half a unit in
their last place.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layca_fast.formulas.bases import Formula
from layca_fast.formulas.options import find_base
from layca_fast.reference import BASES, SMALLEST_SINE, finite, orthogonal_part, reference_step, slices
from layca_fast.state.compensation import HALVES
from layca_fast.state.members import rotates

#: Allowed at once, in units of eps of the tensor's norm; and beyond it, in units of what half a unit in the last place
#: of the inputs makes of the result.
PLAIN, CONDITIONED = 8.0, 100.0


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
        return torch.float32 if self.dtype in HALVES else self.dtype

    @property
    def eps(self) -> float:
        """Of the coarsest type that the base step passes through."""
        short = self.dtype in HALVES and self.group["state_dtype"] == torch.bfloat16 and self.formula.states
        if self.dtype == torch.float64:
            # The reference has no more digits, and the closed form has other roundings.
            return 1e-14
        return torch.finfo(torch.bfloat16 if short else self.compute_dtype).eps / 2

    @property
    def directs(self) -> bool:
        """Whether the step is a direction of whole matrices."""
        return self.formula.direct is not None

    @property
    def step_eps(self) -> float:
        """How far rounding takes the step, in parts of its norm: an iteration multiplies what is small by so much."""
        if not self.directs:
            return 0.0
        growth = float(self.group["ns_coefficients"][0] ** self.group["ns_steps"])
        return growth * (1e-14 if self.group["ns_dtype"] == torch.float64 else self.eps)

    @property
    def is_rounded(self) -> bool:
        """Whether 16 bits are all that is kept of the weights."""
        return self.dtype in HALVES and self.group["compensate"] is False

    @property
    def stored_eps(self) -> float:
        return torch.finfo(self.dtype).eps / 2 if self.is_rounded else self.eps

    @property
    def floor(self) -> float:
        """What an element may be off by, however small it is: denormal numbers count as zero."""
        if self.dtype == torch.float16:
            return 2.0**-24 if self.is_rounded else 2.0**-39
        return 1e-300 if self.dtype == torch.float64 else 1e-37


def before_step(param: Tensor, weight: Tensor, entry: Mapping[str, Any], group: Mapping[str, Any]) -> Before:
    """``weight``: what the parameter stands for; ``entry``: its state, which may lack what this step will make."""
    formula = find_base(group["base"]).formula(group)
    state = {name: value.detach().double().clone() for name, value in entry.items() if isinstance(value, Tensor)}
    return Before(weight.detach().double().clone(), state, group, param.dtype, rotates(param, group), formula)


def _run(
    before: Before, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], **changed: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The reference on copies: the new weights and the new state. ``changed``: other options of the base."""
    group, known = before.group, [name for name in before.formula.states if name in state]
    ours: dict[str, Any] = {name: state[name].clone() for name in known}
    count = int(state["step"]) if before.formula.counts_steps and known else 0
    ours["step"] = count
    if "radius" in state and group["radius"] != "current":
        ours["radius"] = [value or None for value in state["radius"].tolist()]
    options = {name: changed.get(name, group[name]) for name in find_base(group["base"]).options}
    more = {name: group[name] for name in ("rule", "radius", "weight_decay", "maximize")}
    chunks = group["chunks"] if weight.dim() > 0 and (before.turns or before.directs) else 1
    after = weight.clone(memory_format=torch.contiguous_format)
    rate = float(group["lr"])
    reference_step(
        after, grad, ours, lr=rate, base=group["base"], rotate=before.turns, chunks=chunks, **more, **options
    )
    if "radius" in state and group["radius"] == "current":
        ours["radius"] = state["radius"].tolist()
    # Adam's alone counts its steps here.
    ours["step"] = count + 1
    return after, ours


def _nudges(before: Before, grad: Tensor) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]]:
    """The inputs of the step, each of their elements a rounding larger or smaller, and so what a mean keeps."""
    group, options = before.group, {}
    if "betas" in group:
        options["betas"] = (group["betas"][0] + before.eps, group["betas"][1])
    if group.get("centered"):
        options["alpha"] = group["alpha"] + before.eps

    def signs(like: Tensor) -> Tensor:
        return torch.randint(0, 2, like.shape).double().mul_(2).sub_(1)

    for turn in range(3):
        sign = signs(grad)
        weight = before.weight * (1 + before.eps * signs(grad)) if turn == 2 else before.weight
        opposed = [1.0, -1.0, 1.0][turn]
        state = {
            name: value * (1 + before.eps * opposed * sign) if name in before.formula.states else value
            for name, value in before.state.items()
        }
        yield weight, grad * (1 + before.eps * sign), state, options if turn == 2 else {}


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm())


def _is_undecided(before: Before, grad: Tensor) -> bool:
    """Whether the step hangs on a comparison that rounding decides."""
    state, group = before.state, before.group
    signed = -grad if group["maximize"] else grad
    if group["base"] == "lion" and "exp_avg" in state:
        beta = group["betas"][0]
        mixed, size = beta * state["exp_avg"], (1 - beta) * signed
        close = (mixed + size).abs() <= 1e3 * before.eps * (mixed.abs() + size.abs())
        if bool((close & (signed != 0)).any()):
            return True
    if group["base"] == "rmsprop" and group["centered"]:
        keep = group["alpha"]
        square = keep * state.get("square_avg", torch.zeros_like(grad)) + (1 - keep) * grad.square()
        mean = keep * state.get("grad_avg", torch.zeros_like(grad)) + (1 - keep) * signed
        if bool(((square - mean.square()).abs() <= 1e3 * before.eps * square).any()):
            return True
    options = {name: group[name] for name in find_base(group["base"]).options}
    known = {name: value.clone() for name, value in state.items() if name in before.formula.states}
    if before.formula.counts_steps and known:
        known["step"] = int(state["step"])  # type: ignore[assignment]
    if before.directs:
        options["chunks"] = group["chunks"]
    step = finite(BASES[group["base"]](signed, known, **options))
    if before.turns:
        chunks = group["chunks"] if grad.dim() > 0 else 1
        for layer, direction in zip(slices(before.weight, chunks), slices(step, chunks), strict=True):
            length = float(direction.norm())
            sine = float(orthogonal_part(layer, direction).norm()) / length if length else 0.0
            least, most = SMALLEST_SINE / 20, SMALLEST_SINE * 20
            if max(before.eps, before.step_eps) > SMALLEST_SINE:
                # Rounded to a short type, or by many operations, not even a parallel step stays one.
                least, most = 0.0, PLAIN * max(before.eps, before.step_eps)
            if length and least <= sine < most:
                return True
            # As float32 such a step, or its square, is not told from none.
            if 0 < length < (1e-290 if before.dtype == torch.float64 else 1e-33):
                return True
    return False


@dataclass
class Expected:
    """What the reference makes of a step, and :meth:`complain`, which says what is wrong with what was made of it."""

    before: Before
    grad: Tensor
    weight: Tensor
    state: dict[str, Any]
    _slack: dict[str, float] | None = None

    def _bounds(self) -> dict[str, float]:
        """By how much rounded inputs change each result, times what is allowed of it."""
        if self._slack is None:
            self._slack = {}
            for weight, grad, state, options in _nudges(self.before, self.grad):
                moved, others = _run(self.before, weight, grad, state, **options)
                moved = torch.where(self.before.weight.isfinite(), moved, 0.0)
                found = {"weight": _distance(moved, self.weight)}
                found |= {name: _distance(others[name], self.state[name]) for name in self.before.formula.states}
                for name, value in found.items():
                    self._slack[name] = max(self._slack.get(name, 0.0), CONDITIONED * value)
        return self._slack

    def _is_close(self, name: str, actual: Tensor, expected: Tensor, eps: float) -> bool:
        if not torch.equal(actual.isnan(), expected.isnan()):
            return False
        actual, expected = actual.nan_to_num(), expected.nan_to_num()
        distance = _distance(actual, expected)
        start = self.before.weight if name == "weight" else self.before.state.get(name, expected)
        size = max(float(expected.norm()), float(start.nan_to_num().norm()))
        allowed = PLAIN * (eps * size + self.before.floor * math.sqrt(actual.numel()))
        if name == "weight" and self.before.directs:
            allowed += PLAIN * self.before.step_eps * _distance(expected, torch.where(start.isfinite(), start, 0.0))
        return distance <= allowed or distance <= allowed + self._bounds()[name] or math.isnan(self._bounds()[name])

    def complain(self, weight: Tensor, entry: Mapping[str, Any]) -> str | None:
        """What is wrong with the weights and the state after a step, or None."""
        before = self.before
        for name in before.formula.states:
            actual, expected = entry[name].double(), self.state[name]
            stored = torch.finfo(entry[name].dtype).eps / 2
            if not self._is_close(name, actual, expected, max(stored, before.eps)):
                return f"{name} is {actual.flatten()[:8].tolist()}, expected {expected.flatten()[:8].tolist()}"
        if before.formula.counts_steps and float(entry["step"]) != self.state["step"]:
            return f"step is {float(entry['step'])}, expected {self.state['step']}"
        if before.dtype == torch.float16 and bool((self.weight.abs() > 60_000).any()):
            return None
        # What becomes of a broken weight that takes the plain step is nobody's business.
        fine = before.weight.isfinite()
        actual, self.weight = (torch.where(fine, each, 0.0) for each in (weight.double(), self.weight))
        if not self._is_close("weight", actual, self.weight, before.stored_eps) and not _is_undecided(
            before, self.grad
        ):
            return (
                f"weights are {actual.flatten()[:8].tolist()}, expected {self.weight.flatten()[:8].tolist()}: off by "
                f"{_distance(actual, self.weight):.3g} of {float(self.weight.norm()):.3g}"
            )
        if before.turns:
            pairs = zip(entry["radius"].tolist(), self.state["radius"], strict=True)
            same = all(math.isclose(found, asked or 0.0, rel_tol=1e-9) for found, asked in pairs)
            if not same and not _is_undecided(before, self.grad):
                return f"radius is {entry['radius'].tolist()}, expected {self.state['radius']}"
        return None


def expected_of(before: Before, grad: Tensor) -> Expected:
    """``grad`` as the optimizer sees it, unscaled; what it cannot use of it counts as zero here already."""
    typed = grad.to(before.compute_dtype)
    wide = before.formula.admit(typed).double()
    weight, state = _run(before, before.weight, wide, before.state)
    return Expected(before, wide, weight, state)
