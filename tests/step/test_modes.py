"""Steps under modes of torch that watch or replace what is done to tensors: nothing is written behind their backs."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD, AdamW
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layca_fast import FusedLayca, RotationMonitor, attach

from ..support import (
    TORCH,
    clones,
    contents,
    copy_of,
    every_backend,
    native_backends,
    parameter,
    params_of,
    random_gradients,
    same_bits,
    train,
)


def fused(params: Any, backend: str) -> FusedLayca:
    return FusedLayca(params, 0.1, momentum=0.9, backend=backend)


def attached(params: Any, backend: str) -> Any:
    made = SGD(params, lr=0.1, momentum=0.9)
    attach(made, backend=backend)
    return made


def in_backward(params: Any, backend: str) -> Any:
    made = fused(params, backend)
    made.kept = made.step_in_backward()
    return made


MAKES = [fused, attached, in_backward]


def need_lists(make: Any) -> None:
    """Skip where attach()'s operations on lists of tensors are what torch 2.6's own mode for saved ones fails at."""
    if make is attached and TORCH < (2, 7):
        pytest.skip("allow_mutation_on_saved_tensors of this torch takes no lists of tensors")


@every_backend
@pytest.mark.parametrize("make", [fused, attached])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_gradients_of_weights_that_were_saved_before_the_step(
    make: Any, backend: str, steps_before: int, seed: int
) -> None:
    """Under allow_mutation_on_saved_tensors a graph keeps the weights that it was made with."""
    need_lists(make)
    weight = parameter(4, 4, backend=backend)
    optimizer = make([weight], backend)
    train(optimizer, random_gradients([weight], steps_before))
    (expected,) = torch.autograd.grad((weight @ weight).square().sum(), weight)
    with allow_mutation_on_saved_tensors():
        loss = (weight @ weight).square().sum()
        train(optimizer, random_gradients([weight], 2))
        weight.grad = None
        loss.backward()
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("still", [None, 0, 3])
def test_gradients_of_large_weights_that_were_saved_before_the_step(still: int | None, seed: int) -> None:
    """The torch backend writes them block by block, and not at all where a layer stays."""
    weight = parameter(4, 300, 500)
    optimizer = FusedLayca([weight], 0.1, chunks=4, backend="torch")
    train(optimizer, random_gradients([weight], 1))
    (grads,) = random_gradients([weight], 1)
    if still is not None:
        grads[0][still] = 0
    before, factor = weight.detach().clone(), torch.ones_like(weight, requires_grad=True)
    with allow_mutation_on_saved_tensors():
        loss = (weight * factor).sum()
        train(optimizer, [grads])
        loss.backward()
    assert same_bits(factor.grad, before)
    assert not same_bits(weight.detach(), before)


class Watching(TorchDispatchMode):
    """Notes the memory that operations write to."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for each in given if isinstance(given, (list, tuple)) else [given]:
                    self.written.add(each.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


@every_backend
@pytest.mark.parametrize("make", [fused, attached])
def test_dispatch_modes_see_every_write(make: Any, backend: str, seed: int) -> None:
    params = [parameter(4, 3, backend=backend), parameter(5, backend=backend)]
    optimizer = make(params, backend)
    train(optimizer, random_gradients(params, 2))
    before = contents(optimizer)
    (grads,) = random_gradients(params, 1)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    with Watching() as mode:
        optimizer.step()
    changed = 0
    for param, (weight, _, state) in zip(params, before, strict=True):
        now = {"weight": param, **optimizer.state[param]}
        for name, old in {"weight": weight, **state}.items():
            if not same_bits(copy_of(now[name]), old):
                changed += 1
                assert now[name].untyped_storage().data_ptr() in mode.written, name
    assert changed >= 4


class Silent(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "").endswith("_") and isinstance(args[0], Tensor):
            self.written.append(args[0])
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {
    "a dispatch mode": Watching,
    "a function mode": Silent,
    "saved tensors": allow_mutation_on_saved_tensors,
    "a default device": lambda: torch.device("meta"),
}


@every_backend
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_modes_change_no_bit(mode: Any, make: Any, backend: str, seed: int) -> None:
    if mode is allow_mutation_on_saved_tensors:
        need_lists(make)
    params = [parameter(4, 3, backend=backend), parameter(5, backend=backend)]
    with torch.no_grad():
        params[0][0, 0] = -0.0
    optimizers = [make(each, backend) for each in (params, clones(params))]
    grads = random_gradients(params, 3)
    for optimizer, around in zip(optimizers, (mode, contextlib.nullcontext), strict=True):
        for row in grads:
            with around():
                train(optimizer, [row])
    assert same_bits(contents(optimizers[0]), contents(optimizers[1]))


@native_backends
def test_function_modes_see_weights_written(backend: str, seed: int) -> None:
    weight = parameter(4, 3)
    optimizer = fused([weight], backend)
    weight.grad = torch.randn(4, 3)
    with Silent() as mode:
        optimizer.step()
    assert any(each.data_ptr() == weight.data_ptr() for each in mode.written)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_fake_tensors_run_as_under_torchs_optimizers(backend: str, base: str, seed: int) -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        optimizer = FusedLayca(model.parameters(), 0.1, base=base, backend=backend)
        theirs = AdamW(model.parameters(), lr=0.1) if base == "adam" else SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            for each in (optimizer, theirs):
                each.zero_grad()
                model(torch.randn(5, 4)).sum().backward()
                versions = [param._version for param in model.parameters()]
                each.step()
                assert all(new._version > old for new, old in zip(model.parameters(), versions, strict=True))
        assert optimizer.rotation_stats() == {}
    for param in model.parameters():
        ours, other = optimizer.state[param], theirs.state[param]
        assert set(ours) - {"radius"} == set(other)
        assert ("radius" in ours) == (param.dim() == 2)
        assert all(isinstance(value, FakeTensor) for value in ours.values())
        assert all(ours[name].shape == other[name].shape for name in other)


@pytest.mark.parametrize("make", [attached, in_backward])
def test_fake_tensors_elsewhere(make: Any, seed: int) -> None:
    with FakeTensorMode():
        model = nn.Linear(4, 3)
        optimizer = make(model.parameters(), "auto")
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).sum().backward()
            optimizer.step()
    assert optimizer.state[model.weight]["radius"].shape == (1,)


def test_a_backend_that_cannot_take_fake_tensors_says_so(seed: int) -> None:
    with FakeTensorMode():
        model = nn.Linear(4, 3)
        model(torch.randn(5, 4)).sum().backward()
        optimizer = FusedLayca(model.named_parameters(), 0.1, backend="cpu")
        with pytest.raises(ValueError, match=r"'weight'.*FakeTensor.*backend='cpu'.*'auto' or 'torch'"):
            optimizer.step()
        assert not optimizer.state
        optimizer.param_groups[0]["backend"] = "auto"
        optimizer.step()


@pytest.mark.parametrize("steps_before", [0, 2])
@native_backends
def test_real_tensors_under_fake_mode_are_not_touched(backend: str, steps_before: int, seed: int) -> None:
    weight = parameter(4, 3)
    optimizer = fused([weight], backend)
    train(optimizer, random_gradients([weight], steps_before))
    weight.grad = torch.randn(4, 3)
    before = contents(optimizer)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match=r"FakeTensorMode.*outside of it"),
    ):
        optimizer.step()
    assert same_bits(contents(optimizer), before)
    optimizer.step()
    assert not same_bits(contents(optimizer), before)


@native_backends
def test_a_traced_step_is_refused_because_the_trace_would_miss_it(backend: str, seed: int) -> None:
    weight = parameter(4, 3)
    optimizer = fused([weight], backend)
    train(optimizer, random_gradients([weight], 2))
    weight.grad = torch.randn(4, 3)
    before = contents(optimizer)

    def traced(grad: Tensor) -> Tensor:
        optimizer.step()
        return grad * 2

    with pytest.raises(RuntimeError, match=r"ProxyTorchDispatchMode.*outside of it"):
        make_fx(traced)(torch.randn(4, 3))
    assert same_bits(contents(optimizer), before)


def test_a_monitor_under_fake_mode_says_what_it_needs(seed: int) -> None:
    with FakeTensorMode():
        model = nn.Linear(4, 3)
        with pytest.raises((TypeError, RuntimeError), match="Fake"):
            RotationMonitor(model)


def test_params_stay_listed(seed: int) -> None:
    """What a mode sees of a step, it sees of tensors that took part alone."""
    params = [parameter(4, 3), parameter(2, 2)]
    optimizer = fused(params, "cpu")
    train(optimizer, random_gradients(params, 1))
    params[0].grad, params[1].grad = torch.randn(4, 3), None
    with Watching() as mode:
        optimizer.step()
    assert params_of(optimizer)[1].untyped_storage().data_ptr() not in mode.written


@native_backends
def test_dispatch_modes_see_the_momentum_that_directions_are_made_of(backend: str, seed: int) -> None:
    param = parameter(4, 3, backend=backend)
    optimizer = FusedLayca([param], 0.1, base="muon", backend=backend)
    train(optimizer, random_gradients([param], 2))
    (param.grad,) = random_gradients([param], 1)[0]
    with Watching() as mode:
        optimizer.step()
    for tensor in (param, *optimizer.state[param].values()):
        assert tensor.untyped_storage().data_ptr() in mode.written
