"""The base optimizer of one run of a batch, on its pieces."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...formulas.base_steps import finite_or_zero
from ...step.batch import Batch
from .arithmetic import Value, on_values
from .cleaning import is_seen_finite, restarted
from .memory import Pool
from .pieces import Parts, Piece
from .run import Run
from .sums import dots


class Base:
    """What *measure* and *rotate* need of the base steps of ``run``. ``looks``: whether numbers may be read."""

    def __init__(self, batch: Batch, run: Run, pool: Pool, looks: bool) -> None:
        self._formula, self._type, self._state_type = batch.formula, batch.compute_dtype, batch.state_dtype
        self._advance, self._make_step = on_values(batch.formula.advance), on_values(batch.formula.step)
        self._run, self._pool, self._looks = run, pool, looks
        self._grads = [grad for grad in (batch.grads[i] for i in run.indices) if grad is not None]
        self._gradients: Parts | None = None
        # Where it can be looked at, a step that is not taken is not measured at all.
        self._taken = None if batch.taken is None or looks else batch.taken != 0

    def _gradient(self, piece: Piece) -> Value:
        if self._gradients is None:
            self._gradients = self._run.parts(self._grads)
        return self._gradients.cut(piece.block).stacked(self._type, self._pool) * self._run.scale

    def _states(self, piece: Piece) -> list[Value]:
        return [parts.stacked(self._type, self._pool) for parts in piece.states]

    def weight(self, piece: Piece) -> Value:
        """The weights, (layers, elements), in the type that formulas run in; possibly the parameter itself."""
        return piece.weight(self._type, self._pool)

    def _value(self, tensor: Tensor) -> Value:
        return Value(self._pool, tensor)

    def _advanced(self, grad: Value, states: Sequence[Value]) -> list[Value]:
        """The step is made of the states as they are stored: rotate will have nothing else."""
        advanced = self._advance(grad, tuple(states), self._run.options)
        return [value.to(self._state_type).to(self._type) for value in advanced]

    def measure(self, piece: Piece, bad: Tensor) -> Tensor:
        """Advance the states, and return the dots of each layer, (layers, 3); add what is not finite to ``bad``."""
        # Values, not their tensors: memory goes back to the pool with the value.
        raw, weight, old = self._gradient(piece), self.weight(piece), self._states(piece)
        found = None
        if self._looks:
            # First as if all were finite: next to always it is, which the sums show.
            new = self._advanced(raw, old)
            step = self._make_step(raw, tuple(new), self._run.options)
            found = dots(weight, step)
            unseen = [state.tensor for state in new if state is not step]
            unseen += [raw.tensor] if self._formula.hides else []
            if not (math.isfinite(found[:, 2].sum().item()) and all(map(is_seen_finite, unseen))):
                found = None
        if found is None:
            self._run.unclean.add(piece.number)
            new, step = self._cleaned(raw, old, bad)
            found = dots(weight, step)
        for parts, before, after in zip(piece.states, old, new, strict=True):
            if after is not before:
                parts.write(after.tensor if self._taken is None else self._if_taken(after.tensor, before.tensor))
        # As for a tensor without a gradient.
        return found if self._taken is None else self._if_taken(found, torch.zeros_like(found))

    def _if_taken(self, after: Tensor, before: Tensor) -> Tensor:
        assert self._taken is not None
        return torch.where(self._taken, after, before)

    def _cleaned(self, raw: Value, old: Sequence[Value], bad: Tensor) -> tuple[list[Value], Value]:
        """The advanced states and the step, where what is not finite counts as zero."""
        grad = self._clean(raw, self._formula.admit)
        advanced = self._advanced(grad, old)
        tensors = [value.tensor for value in advanced]
        restarts = restarted(tensors, grad.tensor, self._formula.are_squares, self._state_type)
        states = [
            value if state is value.tensor else self._value(state)
            for value, state in zip(advanced, restarts, strict=True)
        ]
        step = self._make_step(grad, tuple(states), self._run.options)
        clean_step = self._clean(step)
        suspects = zip((raw, *advanced, step), (grad, *states, clean_step), strict=True)
        changed = [before.tensor != after.tensor for before, after in suspects if before is not after]
        if changed:
            count = torch.stack(changed).any(0).sum(1)
            bad += count if self._taken is None else self._taken * count
        return states, clean_step

    def _clean(self, value: Value, clean: Callable[[Tensor], Tensor] = finite_or_zero) -> Value:
        return value if is_seen_finite(value.tensor) else self._value(clean(value.tensor))

    def again(self, piece: Piece) -> Value:
        """The base step once more, from the states that measure left."""
        is_clean = piece.number not in self._run.unclean
        grad = None
        if self._formula.reads_grad:
            grad = self._gradient(piece)
            grad = grad if is_clean else self._clean(grad, self._formula.admit)
        step: Value = self._make_step(grad, tuple(self._states(piece)), self._run.options)
        return step if is_clean else self._clean(step)
