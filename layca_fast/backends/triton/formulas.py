"""From Python's formulas to Triton's: :func:`lower` makes Triton functions of those in ``formulas/``.

It takes their code as it stands and gives it other globals, so that no formula is written a second time. What
``formulas/`` builds on, ``where``, ``sqrt``, ``exp`` and the test for finite values, is Triton's own.
"""

# Triton's values have no static types.
# mypy: allow-untyped-defs, allow-untyped-decorators

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import triton
import triton.language as tl

from ...formulas import base_steps


def _probe():
    pass


#: Whether triton.jit makes functions that are interpreted, on CPU tensors, instead of compiled for a GPU.
INTERPRETED = not isinstance(triton.jit(_probe), triton.JITFunction)


def device_function(function: Callable[..., Any]) -> Any:
    """Decorator for what kernels call. Interpreted, plain Python does: Triton's wrapping takes a millisecond a call."""
    return function if INTERPRETED else triton.jit(function)


def constant(value: float) -> Any:
    """A global as compiled code may read it; the key of Triton's cache of compiled kernels contains its value."""
    # The interpreter would make the product of a constexpr and a tensor a constexpr.
    return value if INTERPRETED else tl.constexpr(value)


@device_function
def _where(condition, x, y):
    # Not tl.where itself: the interpreter replaces it only where it is looked up in tl.
    return tl.where(condition, x, y)


@device_function
def _sqrt(x):
    # tl.sqrt is approximate in float32, and tl.sqrt_rn takes nothing else.
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@device_function
def _exp(x):
    return tl.exp(x)


@device_function
def finite_or_zero(x):
    """x where it is finite, else 0."""
    # One comparison where x * 0 == 0 takes two operations, and one that can be found again in the compiled code.
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@device_function
def finite_square_or_zero(x):
    """x where its square is finite, else 0."""
    return tl.where(x * x < float("inf"), x, 0.0)


#: Formulas that Triton has another form of.
OWN = {
    base_steps.finite_or_zero: finite_or_zero,
    base_steps.finite_square_or_zero: finite_square_or_zero,
}


@cache
def lower(function: Callable[..., Any]) -> Any:
    """Triton's version of a function of ``formulas/``, and of all that it calls."""
    if function in OWN:
        return OWN[function]
    assert isinstance(function, FunctionType)
    scope: dict[str, Any] = {"where": _where, "sqrt": _sqrt, "exp": _exp}
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, (int, float)):
            scope[name] = constant(value)
        elif isinstance(value, FunctionType):
            scope[name] = lower(value)
    lowered = FunctionType(function.__code__, scope, function.__name__)
    lowered.__module__, lowered.__qualname__ = function.__module__, function.__qualname__
    return device_function(lowered)
