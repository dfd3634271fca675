"""Parameters and gradients that FusedLayca refuses, by name and with the way out, before anything is modified."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.formulas.bases import BASES

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


class Wrapper(Tensor):
    """A tensor subclass whose data lies elsewhere, as a DTensor's or a quantized weight's does."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [each.inner if isinstance(each, cls) else each for each in args]
        return func(*args, **(kwargs or {}))

    def __repr__(self) -> str:
        return "Wrapper"


class NamedParameter(Parameter):
    """A subclass that only carries attributes: its memory is its own."""


def quantized() -> Tensor:
    with warnings.catch_warnings():
        # Deprecated, and still met in old checkpoints.
        warnings.simplefilter("ignore", UserWarning)
        return torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8)


@dataclass(frozen=True)
class BadTensor:
    """A parameter, made by ``make``, that no kernel may be handed."""

    name: str
    make: Callable[[], Tensor]
    error: type[Exception]
    message: str


BAD_PARAMETERS = (
    BadTensor(
        "sparse", lambda: torch.eye(3).to_sparse(), TypeError, r"\(shape \(3, 3\).*layout torch\.sparse_coo.*to_dense"
    ),
    BadTensor("mkldnn", lambda: torch.randn(3, 4).to_mkldnn(), TypeError, r"layout torch\._mkldnn.*to_dense"),
    BadTensor("complex", lambda: torch.randn(3, 4, dtype=torch.cfloat), TypeError, r"is complex.*view_as_real"),
    BadTensor(
        "integer",
        lambda: torch.ones(3, 4, dtype=torch.int64),
        TypeError,
        r"torch\.int64.*not a floating-point",
    ),
    BadTensor("boolean", lambda: torch.ones(3, 4, dtype=torch.bool), TypeError, r"torch\.bool.*not a floating-point"),
    BadTensor("quantized", quantized, TypeError, r"torch\.qint8.*not a floating-point.*convert"),
    BadTensor(
        "of 8 bits",
        lambda: torch.randn(3, 4).to(torch.float8_e4m3fn),
        TypeError,
        r"torch\.float8_e4m3fn.*float64, float32, bfloat16 and float16.*forward",
    ),
    BadTensor("wrapper subclass", lambda: Wrapper(torch.randn(3, 4)), TypeError, r"is a Wrapper.*plain tensor"),
    BadTensor("expanded", lambda: torch.randn(1, 4).expand(3, 4), ValueError, r"share memory.*\(0, 1\).*clone\(\)"),
    BadTensor(
        "overlapping windows",
        lambda: torch.randn(12).as_strided((5, 4), (2, 1)),
        ValueError,
        r"share memory.*\(2, 1\).*clone\(\)",
    ),
    BadTensor("meta", lambda: torch.empty(3, 4, device="meta"), ValueError, r"meta device.*to_empty"),
    BadTensor("lazy", torch.nn.UninitializedParameter, ValueError, r"not initialized.*forward"),
)


ids = {"ids": lambda case: case.name}


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("case", BAD_PARAMETERS, **ids)
def test_the_constructor_refuses(case: BadTensor, named: bool, seed: int) -> None:
    good = parameter(3, 4)
    params = [("good", good), ("layer.bad", case.make())] if named else [good, case.make()]
    label = r"parameter 'layer\.bad'" if named else "parameter 1 of group 0"
    before = copy_of(good)
    with pytest.raises(case.error, match=f"{label}.*{case.message}"):
        FusedLayca(params, 0.1, backend="torch")
    assert same_bits(copy_of(good), before)


@pytest.mark.parametrize("base", ["sgd", "muon"])
@pytest.mark.parametrize("case", BAD_PARAMETERS, **ids)
def test_a_new_group_is_refused_and_the_run_goes_on(case: BadTensor, base: str, seed: int) -> None:
    optimizer = running()
    before = contents(optimizer)
    with pytest.raises(case.error, match=f"parameter 'new' ?.*{case.message}"):
        optimizer.add_param_group({"params": [("fine", parameter(2, 2)), ("new", case.make())], "base": base})
    assert len(optimizer.param_groups) == 1
    assert same_bits(contents(optimizer), before)
    optimizer.step()


def test_subclasses_with_memory_of_their_own_are_welcome(seed: int) -> None:
    plain = parameter(3, 4)
    named = NamedParameter(plain.detach().clone())
    optimizers = [FusedLayca([param], 0.1, momentum=0.9, backend="torch") for param in (plain, named)]
    grads = random_gradients([plain], 2)
    for optimizer in optimizers:
        train(optimizer, grads)
    assert torch.equal(plain, named)


TWICE = {
    "in one group": lambda good, twice: [{"params": [("good", good), ("encoder", twice), ("decoder", twice)]}],
    "in two groups": lambda good, twice: [
        {"params": [("good", good), ("encoder", twice)]},
        {"params": [("decoder", twice)], "rotate": False},
    ],
}


@pytest.mark.parametrize("groups", TWICE.values(), ids=TWICE.keys())
def test_the_same_parameter_twice_is_named(groups: Callable[..., Any], seed: int) -> None:
    with pytest.raises(ValueError, match=r"(?s)parameter '(encoder|decoder)'.*(once|twice)"):
        FusedLayca(groups(parameter(2, 2), parameter(3, 4)), 0.1, backend="torch")


def test_the_same_parameter_added_again_is_named_and_the_run_goes_on(seed: int) -> None:
    optimizer = running()
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"parameter '(matrix|again)'"):
        optimizer.add_param_group({"params": [("again", params_of(optimizer)[0])]})
    assert len(optimizer.param_groups) == 1
    assert same_bits(contents(optimizer), before)


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


@dataclass(frozen=True)
class NoMatrix:
    """A tensor that base="muon" cannot direct, with the options of its group."""

    shape: tuple[int, ...]
    options: Mapping[str, Any]
    message: str


NO_MATRICES = (
    NoMatrix((), {}, r"shape \(\).*is no matrix.*layer_groups\(model, base='muon', others_base='adam'\)"),
    NoMatrix((5,), {"rotate": None}, r"shape \(5,\).*is no matrix.*layer_groups"),
    NoMatrix((5,), {"rotate": False}, r"shape \(5,\).*is no matrix.*layer_groups"),
    NoMatrix((6, 4), {"chunks": "all"}, r"chunks='all' cuts .*\(6, 4\).* into vectors.*fewer chunks"),
    NoMatrix((6, 4), {"chunks": 6}, r"chunks=6 cuts .*into vectors.*fewer chunks"),
    NoMatrix((6, 4), {"chunks": 4}, r"chunks=4 does not divide"),
    NoMatrix((6, 4), {"chunks": "columns"}, r"chunks='columns' cuts .*into vectors.*fewer chunks"),
    NoMatrix((6, 4, 3, 3), {"chunks": "columns"}, r"chunks='columns' cuts .*into vectors.*fewer chunks"),
    NoMatrix((6, 4), {"chunks": ("columns", 4)}, r"'columns', 4.* cuts .*into vectors"),
    NoMatrix((6, 4), {"chunks": (4, 1)}, r"chunks=\(4, 1\) adds up to 5"),
)


@pytest.mark.parametrize("case", NO_MATRICES, ids=str)
def test_what_is_no_matrix_has_no_direction(case: NoMatrix, seed: int) -> None:
    """Found at construction, in a new group, and where a group changes its base mid-run; nothing is modified."""
    param = parameter(*case.shape)
    with pytest.raises(ValueError, match=case.message):
        FusedLayca([param], 0.1, base="muon", **case.options)
    optimizer = running()
    with pytest.raises(ValueError, match=case.message):
        optimizer.add_param_group({"params": [("new", param)], "base": "muon", **case.options})
    assert len(optimizer.param_groups) == 1
    changed = FusedLayca([param], 0.1, backend="torch")
    train(changed, random_gradients([param], 1))
    before = contents(changed)
    changed.param_groups[0].update({**BASES["muon"].options, "base": "muon", **case.options})
    with pytest.raises(ValueError, match=case.message):
        changed.step()
    assert same_bits(contents(changed), before)
