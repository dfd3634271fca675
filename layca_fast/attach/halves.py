"""16-bit parameters: the float32 weights that another optimizer steps in their place, and the step that it took there.

A base step of 1e-3 of a bfloat16 weight is less than what its type can tell apart, so nothing of it could be read from
the parameter. The optimizer is given the float32 weight that the parameter and its remainder stand for, with a float32
gradient. It makes its state of them, and so keeps float32 moments, as it would for a float32 model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..compat import is_fake
from ..state.compensation import HALVES, compute_dtype, join
from ..state.modes import out_of_inference
from ..state.sharding import local_gradient, local_of, wrap
from ..state.structure import mapped
from .exchange import block_on, pieces


def is_half(param: Tensor) -> bool:
    """Whether its optimizer is to step a float32 weight in its place, if it turns."""
    return param.dtype in HALVES


class Master:
    """The float32 weight of a 16-bit ``param``, whose ``alias`` a plan turns.

    ``alias.grad`` has the memory of that weight: first the weight itself, which the optimizer steps, and then the step
    that it took. A copy from before the step needs no memory: parameter and remainder still are it.
    """

    def __init__(self, param: Tensor, alias: Tensor) -> None:
        self.param, self._alias = param, alias
        local = local_of(alias)
        self._buffer = torch.empty_like(local, dtype=compute_dtype(local.dtype), requires_grad=False)
        # The step is a float32 gradient of a 16-bit tensor.
        alias.grad_dtype = None
        alias.grad = wrap(self._buffer, param)
        self._weight: Parameter | None = None

    def drop(self) -> None:
        """Let the memory go."""
        self._weight = self._alias.grad = None

    def fill(self, remainder: Tensor) -> Parameter:
        """The weight to step, with its gradient, made of the parameter and its ``remainder`` as they are."""
        weight = self._weight
        if weight is None or not self._is_here(local_of(weight)):
            with out_of_inference():
                weight = Parameter(wrap(self._buffer, self.param))
            self._weight = weight
        # Some optimizers look for marks that their users have put on parameters.
        vars(weight).update(vars(self.param))
        local = local_of(self._alias)
        for buffer, param, rest in pieces((self._buffer, local, local_of(remainder)), block_on(local.device)):
            buffer.copy_(join(param, rest))
        grad = self.param.grad
        if grad is None:
            weight.grad = None
        else:
            weight.grad = wrap(local_gradient(grad, self.param).to(self._buffer.dtype), self.param)
        return weight

    def _is_here(self, weight: Tensor) -> bool:
        """Whether a weight still has the memory that it was given: some optimizers put new memory under theirs."""
        here = self._buffer
        same = is_fake(here) or weight.data_ptr() == here.data_ptr()
        return same and (weight.shape, weight.stride(), weight.dtype) == (here.shape, here.stride(), here.dtype)

    def take(self, weight: Tensor | None, remainder: Tensor) -> None:
        """Leave in ``alias.grad`` what has become of the weight; nothing, if it is None."""
        if weight is None:
            self._buffer.zero_()
            return
        weight.grad = None
        local, stepped = local_of(self._alias), local_of(weight).detach()
        tensors = (self._buffer, local, local_of(remainder), stepped)
        for buffer, param, rest, after in pieces(tensors, block_on(local.device)):
            torch.sub(join(param, rest), after, out=buffer)


def widened(entry: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """What a 16-bit ``param`` had as its optimizer's state before it turned, for float32 weights to go on from."""

    def widen(value: Tensor) -> Tensor:
        return value.float() if value.dtype == param.dtype else value

    return {name: mapped(value, Tensor, widen) for name, value in entry.items()}


def narrowed(entry: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """The state of a 16-bit ``param`` that turns no more, in the type that its plain optimizer would have made it."""

    def narrow(value: Tensor) -> Tensor:
        # Counts and rates are numbers, of a type of their own.
        return value.to(param.dtype) if value.dtype == compute_dtype(param.dtype) and value.dim() > 0 else value

    return {name: value if name == "step" else mapped(value, Tensor, narrow) for name, value in entry.items()}
