"""What a step must make of one tensor, by the float64 reference, and how far from that its type lets it be.

The comparison is of single steps, each from the weights and the state that the step before has left, so that errors do
not add up and no chaos needs a wide tolerance. New states are compared first. The optimizer makes its step of them as
they are stored, so the reference makes the new weights of the same: what 16 bits have rounded away of a state does not
widen the comparison of weights. What is stored in 16 bits must be the nearest of them to a number that could be right.
Where a tensor is further off than rounding usually takes it, the reference itself says how ill-conditioned the step is:
it is run again on inputs that are changed by half a unit in their last place.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layca_fast.formulas.rotation import NEARLY_PARALLEL_SINE2
from layca_fast.reference import SMALLEST_SINE, orthogonal_part, slices
from layca_fast.state.compensation import HALVES

from .before import Before, Outcome, reference

#: Allowed at once, in units of half a unit in the last place of the tensor's norm: no result has more roundings on its
#: way than that.
PLAIN = 8.0

#: Beyond it, in units of what half a unit in the last place of the inputs makes of the result: as many roundings, and
#: twice that, because the few changes tried are not the worst ones.
CONDITIONED = 2 * PLAIN


def _nudges(before: Before, state: Mapping[str, Tensor], grad: Tensor) -> Iterator[dict[str, Any]]:
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
        opposed = [1.0, -1.0, 1.0][turn]
        nudged = {
            name: value * (1 + before.eps * opposed * sign) if name in before.formula.states else value
            for name, value in state.items()
        }
        weight = before.weight * (1 + before.eps * signs(grad)) if turn == 2 else before.weight
        more = options if turn == 2 else {}
        yield {"weight": weight, "grad": grad * (1 + before.eps * sign), "state": nudged, **more}


def _distance(actual: Tensor, expected: Tensor, stored: torch.dtype) -> float:
    """Between numbers stored in this type and others: in 16 bits, what is beyond the rounding to the nearest."""
    difference = (actual - expected).abs()
    if stored in HALVES:
        info = torch.finfo(stored)
        exponent = torch.frexp(actual.abs().clamp(min=info.tiny)).exponent
        difference = (difference - 2.0 ** (exponent - 1) * info.eps / 2).clamp(min=0)
    return float(difference.norm())


def _layers(before: Before, tensor: Tensor) -> list[Tensor]:
    return slices(tensor, before.group["chunks"] if tensor.dim() > 0 else 1)


def _is_near_zero(difference: Tensor, terms: Tensor, eps: float) -> bool:
    """Whether rounding may decide the sign of some difference of ``terms``, their sizes added."""
    return bool(((difference.abs() <= eps * terms) & (terms > 0)).any())


@dataclass
class Expected:
    """What the reference makes of a step, and :meth:`complain`, which says what is wrong with what was made of it.

    ``tally`` counts the tensors that were compared, and those of them of which nothing can be said: ``undecided``,
    where rounding decides which way the step goes; ``ill-conditioned``, where roundings of the inputs change the
    weights by as much as the step does, or all of a state; ``overflowing`` float16. Of those whose step is ``small``,
    within what rounding may do, no more is known than that they stay where they are.
    """

    before: Before
    grad: Tensor
    tally: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        before = self.before
        self._plain = reference(before, before.weight, self.grad, before.state)
        self._slack: dict[str, float] | None = None

    def _state_slack(self) -> dict[str, float]:
        """By how much rounded inputs change each new state."""
        if self._slack is None:
            self._slack = {}
            for inputs in _nudges(self.before, self.before.state, self.grad):
                found = reference(self.before, **inputs).state
                for name in self.before.formula.states:
                    moved = _distance(found[name], self._plain.state[name], torch.float64)
                    self._slack[name] = max(self._slack.get(name, 0.0), moved)
        return self._slack

    def _allowed(self, expected: Tensor, start: Tensor) -> float:
        size = max(float(expected.norm()), float(start.nan_to_num().norm()))
        return PLAIN * (self.before.eps * size + self.before.floor * math.sqrt(expected.numel()))

    def _complain_of_state(self, name: str, actual: Tensor) -> str | None:
        expected = self._plain.state[name]
        complaint = f"{name} is {actual.flatten()[:8].tolist()}, expected {expected.flatten()[:8].tolist()}"
        if not bool(actual.isfinite().all()):
            return complaint
        distance = _distance(actual.double(), expected, actual.dtype)
        allowed = self._allowed(expected, self.before.state.get(name, expected))
        if distance <= allowed:
            return None
        if self._is_state_undecided(name):
            self.tally["undecided state"] += 1
            return None
        allowed += CONDITIONED * self._state_slack()[name]
        if not distance <= allowed:
            return f"{complaint}: off by {distance:.3g}, allowed {allowed:.3g}"
        self.tally["ill-conditioned state"] += not allowed < float(expected.norm())
        return None

    def _is_state_undecided(self, name: str) -> bool:
        group, state = self.before.group, self.before.state
        if group["base"] != "rmsprop" or not group["centered"] or name != "momentum_buffer":
            return False
        # Whether the variance is negative, so that the step is none. Of some four roundings each.
        square, mean = self._plain.state["square_avg"], self._plain.state["grad_avg"]
        largest = torch.maximum(state.get("grad_avg", mean).abs(), self.grad.abs())
        return _is_near_zero(square - mean.square(), square + mean.abs() * largest, PLAIN * self.before.eps)

    def _is_step_undecided(self, stored: Mapping[str, Tensor], step: Tensor) -> bool:
        """Whether the step hangs on a comparison that rounding decides."""
        before, group = self.before, self.before.group
        if group["base"] == "lion":
            first, second = group["betas"]
            old = first / second * stored["exp_avg"]
            new = ((1 - first) - first / second * (1 - second)) * before.signs * self.grad
            if _is_near_zero(old + new, old.abs() + new.abs(), PLAIN * before.eps):
                return True
        if group["base"] == "rmsprop" and group["centered"] and "momentum_buffer" not in stored:
            square, mean = stored["square_avg"], stored["grad_avg"]
            if _is_near_zero(square - mean.square(), square, PLAIN * before.eps):
                return True
        if not before.turns:
            return False
        for layer, direction in zip(_layers(before, before.weight), _layers(before, step), strict=True):
            length = float(direction.norm())
            sine = float(orthogonal_part(layer, direction).norm()) / length if length else 0.0
            # So far roundings may turn the direction: not even a parallel one stays that.
            turned = PLAIN * max(before.eps, before.step_eps)
            if length and SMALLEST_SINE - turned <= sine < SMALLEST_SINE + turned:
                return True
            # As float32 such a step, or its square, is not told from none.
            if 0 < length < (1e-290 if before.dtype == torch.float64 else 1e-33):
                return True
        return False

    def _turned(self, step: Tensor, start: Tensor, expected: Tensor) -> float:
        """How far the weights go because a unit of rounding turns the step.

        It moves the end of the step by eps of its norm, and of that norm only the part across the weights, the sine of
        the angle between them, says where they go. The changes of :func:`_nudges` may all lie along a short step. Where
        the norm of that part is taken from three dots, their own rounding counts, by the square of the sine.
        """
        before = self.before
        if not before.turns or before.group["rule"] != "layca":
            return 0.0
        total = 0.0
        for layer, direction, end in zip(*(_layers(before, each) for each in (start, step, expected)), strict=True):
            across, length = float(orthogonal_part(layer, direction).norm()), float(direction.norm())
            if across > 0:
                square = (across / length) ** 2
                of_dots = torch.finfo(torch.float64).eps / (2 * square) if square >= NEARLY_PARALLEL_SINE2 else 0.0
                total += (float((end - layer).norm()) * (before.eps * length / across + of_dots)) ** 2
        return math.sqrt(total)

    def _complain_of_weight(self, weight: Tensor, stored: Mapping[str, Tensor], outcome: Outcome) -> str | None:
        before = self.before
        # What becomes of a broken weight that takes the plain step is nobody's business.
        fine = before.weight.isfinite()
        actual, expected, start = (
            torch.where(fine, each, 0.0) for each in (weight.double(), outcome.weight, before.weight)
        )
        complaint = f"weights are {actual.flatten()[:8].tolist()}, expected {expected.flatten()[:8].tolist()}"
        if not torch.equal(actual.isnan(), expected.isnan()):
            return complaint
        actual, expected = actual.nan_to_num(), expected.nan_to_num()
        kept = before.dtype if before.is_rounded else torch.float64
        distance, way = _distance(actual, expected, kept), _distance(start, expected, torch.float64)
        allowed = self._allowed(expected, start)
        self.tally["small"] += 0 < way < allowed
        if before.directs:
            allowed += PLAIN * before.step_eps * way
        if distance <= allowed:
            return None
        if self._is_step_undecided(stored, outcome.base_step):
            self.tally["undecided"] += 1
            return None
        allowed += PLAIN * self._turned(outcome.base_step, start, expected)
        slack = 0.0
        for inputs in _nudges(before, stored, self.grad):
            moved = reference(before, inputs["weight"], inputs["grad"], before.state, inputs["state"]).weight
            slack = max(slack, _distance(torch.where(fine, moved, 0.0).nan_to_num(), expected, torch.float64))
        allowed += CONDITIONED * slack
        if not distance <= allowed:
            size = float(expected.norm())
            return f"{complaint}: off by {distance:.3g} of {size:.3g}, moved {way:.3g}, allowed {allowed:.3g}"
        self.tally["ill-conditioned"] += allowed > max(way, PLAIN * before.eps * float(expected.norm()))
        return None

    def complain(self, weight: Tensor, entry: Mapping[str, Any]) -> str | None:
        """What is wrong with the weights and the state after a step, or None."""
        before = self.before
        self.tally["compared"] += 1
        for name in before.formula.states:
            complaint = self._complain_of_state(name, entry[name])
            if complaint is not None:
                return complaint
        if before.formula.counts_steps and float(entry["step"]) != self._plain.state["step"]:
            return f"step is {float(entry['step'])}, expected {self._plain.state['step']}"
        stored = {name: entry[name].double() for name in before.formula.states}
        outcome = reference(before, before.weight, self.grad, before.state, stored)
        if before.dtype == torch.float16 and bool((outcome.weight.abs() > 60_000).any()):
            self.tally["overflowing"] += 1
            return None
        complaint = self._complain_of_weight(weight, stored, outcome)
        if complaint is not None or not before.turns:
            return complaint
        pairs = zip(entry["radius"].tolist(), outcome.state["radius"], strict=True)
        same = all(math.isclose(max(found, 0.0), asked or 0.0, rel_tol=1e-9) for found, asked in pairs)
        if not same and not self._is_step_undecided(stored, outcome.base_step):
            return f"radius is {entry['radius'].tolist()}, expected {outcome.state['radius']}"
        return None


def expected_of(before: Before, grad: Tensor, tally: Counter[str]) -> Expected:
    """``grad`` as the optimizer sees it, unscaled; what it cannot use of it counts as zero here already."""
    typed = grad.to(before.compute_dtype)
    return Expected(before, before.formula.admit(typed).double(), tally)
