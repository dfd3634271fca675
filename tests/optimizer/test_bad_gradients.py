"""Gradients that FusedLayca refuses, by name and with the way out, before anything is modified."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca

from ..support import (
    contents,
    copy_of,
    native_backends,
    parameter,
    params_of,
    random_gradients,
    running,
    same_bits,
    train,
)
from .bad_support import Wrapper, ids


def sparse_gradient(param: Tensor) -> None:
    param.grad = torch.randn_like(param).to_sparse()


def gradient_of_before(param: Tensor) -> None:
    """The weights were replaced, the gradient is still that of the old ones."""
    param.grad = torch.randn_like(param)
    param.data = torch.randn(6, 3)


def wrapped_gradient(param: Tensor) -> None:
    param.grad = Wrapper(torch.randn_like(param))


@dataclass(frozen=True)
class BadGradient:
    """A gradient that ``spoil`` gives to the parameter "matrix" of shape (4, 3)."""

    name: str
    spoil: Callable[[Tensor], None]
    error: type[Exception]
    message: str


BAD_GRADIENTS = (
    BadGradient("sparse", sparse_gradient, TypeError, r"layout torch\.sparse_coo.*dense gradients \(sparse=False\)"),
    BadGradient("another shape", gradient_of_before, ValueError, r"has shape .*4, 3.*, its parameter .*6, 3"),
    BadGradient("wrapper subclass", wrapped_gradient, TypeError, r"is a Wrapper.*plain tensors only"),
)


@pytest.mark.parametrize("steps_before", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("case", BAD_GRADIENTS, **ids)
@pytest.mark.parametrize("base", ["sgd", "muon"])
@native_backends
def test_a_gradient_that_does_not_fit(backend: str, base: str, case: BadGradient, steps_before: int, seed: int) -> None:
    """The parameters before and after it in the batch must not move either."""
    last = (5, 1) if base == "muon" else (5,)
    params = [parameter(2, 5, backend=backend), parameter(4, 3, backend=backend), parameter(*last, backend=backend)]
    named = zip(("first", "matrix", "last"), params, strict=True)
    optimizer = FusedLayca(named, 0.1, base=base, momentum=0.9, backend=backend)
    train(optimizer, random_gradients(params, steps_before))
    for param in params:
        param.grad = torch.randn_like(param)
    params[1].grad = None
    case.spoil(params[1])
    before = bits(optimizer)
    with pytest.raises(case.error, match=rf"the gradient of parameter 'matrix'.*{case.message}"):
        optimizer.step()
    assert same_bits(bits(optimizer), before)
    params[1].grad, params[1].data = None, torch.randn(4, 3).to(params[1].device)
    optimizer.step()
    assert not same_bits(bits(optimizer)[0], before[0])


def bits(optimizer: FusedLayca) -> list[Any]:
    """The contents of the optimizer, a wrapped gradient as what it wraps."""
    unwrapped = []
    for param in params_of(optimizer):
        grad = param.grad.inner if isinstance(param.grad, Wrapper) else param.grad
        unwrapped.append(copy_of([param, grad, dict(optimizer.state.get(param, {}))]))
    return unwrapped


FOREIGN = {
    "on another device": (torch.zeros(4, 3, device="meta"), ValueError, "has device meta, its parameter cpu"),
    "of integers": (torch.ones(4, 3, dtype=torch.int32), TypeError, r"torch\.int32.*no floating-point.*torch\.float32"),
    "complex": (torch.ones(4, 3, dtype=torch.complex64), TypeError, r"torch\.complex64.*no floating-point"),
}


@pytest.mark.parametrize(("foreign", "error", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_gradient_that_torch_itself_would_not_set(
    foreign: Tensor, error: type[Exception], message: str, seed: int
) -> None:
    """Subclasses may hand out any gradient."""

    class Odd(Parameter):
        grad = foreign

    good, bad = parameter(2, 2), Odd(torch.randn(4, 3))
    good.grad = torch.randn_like(good)
    optimizer = FusedLayca([("good", good), ("bad", bad)], 0.1, momentum=0.9, backend="torch")
    before = copy_of([good, bad])
    with pytest.raises(error, match=f"the gradient of parameter 'bad'.*{message}"):
        optimizer.step()
    assert same_bits(copy_of([good, bad]), before)
    assert len(optimizer.state) == 0


@native_backends
def test_a_module_cast_to_8_bits_mid_run(backend: str, seed: int) -> None:
    module = torch.nn.Linear(3, 4).to(parameter(1, backend=backend).device)
    optimizer = FusedLayca(module.named_parameters(), 0.1, momentum=0.9, backend=backend)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    module.to(torch.float8_e4m3fn)
    before = contents(optimizer)
    with pytest.raises(TypeError, match=r"parameter 'weight'.*torch\.float8_e4m3fn.*float64, float32, bfloat16"):
        optimizer.step()
    assert same_bits(contents(optimizer), before)
    module.float()
    train(optimizer, random_gradients(params_of(optimizer), 1))


@pytest.mark.parametrize("what", ["parameter", "gradient"])
@native_backends
def test_memory_that_was_freed_is_an_error(what: str, backend: str, seed: int) -> None:
    optimizer = running(backend=backend)
    params = params_of(optimizer)
    train(optimizer, random_gradients(params, 1))
    freed = params[0] if what == "parameter" else params[0].grad
    before = contents(optimizer)
    storage = freed.untyped_storage()
    size, kept = storage.nbytes(), freed.detach().clone()
    storage.resize_(0)
    with pytest.raises(ValueError, match=f"{'gradient of ' * (what == 'gradient')}parameter.*was freed"):
        optimizer.step()
    storage.resize_(size)
    freed.detach().copy_(kept)
    assert same_bits(contents(optimizer), before)
