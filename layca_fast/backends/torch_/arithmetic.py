"""The formulas on values whose memory is kept from one to the next.

Each operation is one of torch's, rounded once: nothing is fused. Where torch fuses a product and a sum, it does so in
some of its builds, and there not at the end of a run of elements, so bits would depend on what else is in a stack and
on the number of threads.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .memory import Pool


class Value:
    """A tensor on which formulas compute. What they make lies in memory of ``pool``, which has it back with the value.

    ``buffer``: what was taken for ``tensor``; None where that is somebody else's.
    """

    __slots__ = ("_buffer", "_pool", "tensor")

    def __init__(self, pool: Pool, tensor: Tensor, buffer: Tensor | None = None) -> None:
        self._pool, self.tensor, self._buffer = pool, tensor, buffer

    def __del__(self) -> None:
        if self._buffer is not None:
            self._pool.give(self._buffer)

    def _result(self, compute: Callable[..., Tensor], *operands: Any) -> "Value":
        out = empty(self._pool, self.tensor.shape, self.tensor.dtype, self.tensor.device)
        compute(*map(_plain, operands), out=out.tensor)
        return out

    def __mul__(self, other: "Value | Tensor | float") -> "Value":
        if isinstance(other, (int, float)) and other == 1:
            return self
        return self._result(torch.mul, self, other)

    __rmul__ = __mul__

    def __add__(self, other: "Value | Tensor | float") -> "Value":
        return self._result(torch.add, self, other)

    __radd__ = __add__

    def __sub__(self, other: "Value") -> "Value":
        return self._result(torch.sub, self, other)

    def __truediv__(self, other: "Value") -> "Value":
        return self._result(torch.div, self, other)

    def __gt__(self, other: "Value | float") -> Tensor:
        found: Tensor = self.tensor > _plain(other)
        return found

    def __lt__(self, other: "Value | float") -> Tensor:
        found: Tensor = self.tensor < _plain(other)
        return found

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        found: Tensor = self.tensor == _plain(other)
        return found

    __hash__ = None  # type: ignore[assignment]

    def sqrt(self) -> "Value":
        """The square roots."""
        return self._result(torch.sqrt, self)

    def to(self, dtype: torch.dtype) -> "Value":
        """The same numbers in this type; itself where they are."""
        return self if self.tensor.dtype == dtype else copied(self._pool, self.tensor, dtype)


def empty(pool: Pool, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Value:
    """A value with anything in it."""
    return Value(pool, *pool.take(shape, dtype, device))


def copied(pool: Pool, tensor: Tensor, dtype: torch.dtype) -> Value:
    """A copy of ``tensor`` in this type."""
    value = empty(pool, tensor.shape, dtype, tensor.device)
    value.tensor.copy_(tensor)
    return value


def _plain(value: Any) -> Any:
    return value.tensor if isinstance(value, Value) else value


def _where(condition: Tensor, x: Any, y: Any) -> Any:
    found = torch.where(condition, _plain(x), _plain(y))
    value = next((each for each in (x, y) if isinstance(each, Value)), None)
    return found if value is None else Value(value._pool, found)


#: What formulas call by name. Torch's own functions would show values to every function mode that is on.
_FUNCTIONS: dict[str, Callable[..., Any]] = {"where": _where, "sqrt": Value.sqrt}


@cache
def on_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """A formula of ``formulas/base_steps.py``, and all that it calls, for values."""
    assert isinstance(function, FunctionType)
    scope = dict(function.__globals__)
    for name in function.__code__.co_names:
        value = scope.get(name)
        if name in _FUNCTIONS:
            scope[name] = _FUNCTIONS[name]
        elif isinstance(value, FunctionType):
            scope[name] = on_values(value)
    return FunctionType(function.__code__, scope, function.__name__)
