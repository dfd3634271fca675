"""Iterative refinement: whether residual blocks step down the gradient of the loss, and how far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import PassWatcher, first_of
from .spectrum import precise

RETURNS = ("sum", "branch")


@dataclass(frozen=True)
class Refinement:
    """One block in one pass, means over the samples: cos(F(h), -dL/dh), and |F(h)| / |h|.

    Samples where a number is undefined (F(h), dL/dh or h are zero) are left out of it; NaN where all are, or where h
    needs no gradient.
    """

    cosine: float
    ratio: float


@dataclass
class _Call:
    """One call of a block: its input until its output is there, F(h) until the gradient is."""

    inputs: Tensor | None
    branch: Tensor | None = None
    cosines: list[Tensor] = field(default_factory=list)
    ratios: list[Tensor] = field(default_factory=list)


class IterativeRefinement(PassWatcher[dict[str, list[_Call]], Refinement]):
    """Watches residual blocks h + F(h): cos(F(h), -dL/dh) and |F(h)| / |h|, per sample, through hooks.

    A block that refines what it gets moves it against the gradient: a positive cosine (Jastrzebski et al., Residual
    connections encourage iterative inference). ``records[pass][name]`` is a :class:`Refinement`.

    Args:
        model: its forward passes with gradients enabled are counted, each with the backward pass before the next one.
        blocks: names of modules whose first argument is h, with samples along its first dimension.
        every: measure every k-th pass.
        returns: "sum" where the modules return h + F(h) (the first of a tuple), as blocks of pre-activation ResNets and
            transformers do; "branch" where they return F(h), as where something follows the sum.

    Memory: F(h) of every block until its gradient is there, and a copy of h while the block runs. Time: a few passes
    over h, F(h) and dL/dh, in float64. Under "sum", F(h) is a difference and carries the rounding of the sum.

    Raises TypeError or ValueError for arguments that it cannot take, and in the forward pass for blocks whose input or
    output is no tensor, or, under "sum", where their shapes differ.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], *, every: int = 1, returns: str = "sum") -> None:
        super().__init__(model, every)
        self._returns = returns
        try:
            chosen = _choose_blocks(model, blocks, returns)
        except BaseException:
            self.remove()
            raise
        for name, block in chosen.items():
            self._handles += [
                block.register_forward_pre_hook(partial(self._before, name), with_kwargs=True),
                block.register_forward_hook(partial(self._after, name)),
            ]

    def _new_notes(self) -> dict[str, list[_Call]]:
        return {}

    @torch.no_grad()
    def _before(self, name: str, block: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        notes = self._notes
        if notes is None:
            return
        inputs = first_of(args, kwargs, f"the input of block {name!r}")
        # The block may add in place.
        call = _Call(inputs.detach().clone())
        notes.setdefault(name, []).append(call)
        if inputs.requires_grad:
            inputs.register_hook(partial(self._on_gradient, call))

    @torch.no_grad()
    def _after(self, name: str, block: nn.Module, args: Any, output: Any) -> None:
        calls = (self._notes or {}).get(name, [])
        call = next((call for call in reversed(calls) if call.inputs is not None), None)
        if call is None or call.inputs is None:
            return
        result = first_of(output, {}, f"the output of block {name!r}").detach()
        if self._returns == "sum":
            if result.shape != call.inputs.shape:
                raise ValueError(
                    f"block {name!r} returns shape {tuple(result.shape)} for an input of {tuple(call.inputs.shape)}: "
                    "it is no h + F(h); leave it out of blocks, or name its branch under returns='branch'"
                )
            call.branch = result - call.inputs
        else:
            # What follows may add in place.
            call.branch = result.clone()
        call.ratios.append(_norms(call.branch) / _norms(call.inputs))
        call.inputs = None

    @staticmethod
    @torch.no_grad()
    def _on_gradient(call: _Call, grad: Tensor) -> None:
        if call.branch is not None and call.branch.shape == grad.shape:
            step, down = precise(call.branch).flatten(1), -precise(grad).flatten(1)
            call.cosines.append((step * down).sum(1) / (_norms(step) * _norms(down)))
            call.branch = None

    def _results(self, notes: dict[str, list[_Call]]) -> dict[str, Refinement]:
        return {
            name: Refinement(
                _mean([each for call in calls for each in call.cosines]),
                _mean([each for call in calls for each in call.ratios]),
            )
            for name, calls in notes.items()
        }


def _norms(tensor: Tensor) -> Tensor:
    """Of each sample, (N,)."""
    rows = precise(tensor).flatten(1) if tensor.dim() > 1 else precise(tensor).unsqueeze(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _mean(samples: Sequence[Tensor]) -> float:
    if not samples:
        return math.nan
    values = torch.cat(list(samples))
    values = values[values.isfinite()]
    return float(values.mean()) if len(values) > 0 else math.nan


def _choose_blocks(model: nn.Module, names: Sequence[str], returns: str) -> dict[str, nn.Module]:
    if returns not in RETURNS:
        raise ValueError(f"returns={returns!r} is unknown: choose one of {list(RETURNS)}")
    if isinstance(names, str):
        raise TypeError(f"blocks={names!r}: pass a list of names, [{names!r}]")
    modules = dict(model.named_modules(remove_duplicate=False))
    if not names:
        raise ValueError("blocks: name at least one residual block, as model.named_modules() does")
    for name in names:
        if name not in modules:
            raise ValueError(
                f"blocks: {name!r} is no module of this {type(model).__name__}: choose from {list(modules)}"
            )
    return {name: modules[name] for name in names}
