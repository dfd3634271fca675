"""What stepping inside backward refuses, and what is left when something fails on the way."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from layca_fast import FusedLayca

from ..support import contents, native_backends, parameter, params_of, same_bits, train
from .support import assert_same, backward, pair, train_in_backward


@native_backends
def test_a_second_backward_raises_before_it_modifies_anything(backend: str, seed: int) -> None:
    ordinary, inside, rows = pair(backend)
    train(ordinary, rows[:1])
    train_in_backward(inside, rows[:1])
    # The second one begins with a parameter that the first has not stepped.
    first: list[Any] = [rows[1][0], rows[1][1], None]
    second: list[Any] = [rows[2][0], rows[2][1], rows[2][2]]
    backward(params_of(inside), first)
    before = contents(inside)
    for row in (second, [None, None, rows[2][2]], [rows[2][0], None, None]):
        with pytest.raises(RuntimeError, match="second backward pass before optimizer"):
            backward(params_of(inside), row)
        assert same_bits(contents(inside), before)
    inside.step()
    train(ordinary, [first, rows[3]])
    train_in_backward(inside, rows[3:])
    assert_same(inside, ordinary)


class Broken(torch.autograd.Function):
    """Fails on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise OSError("lost")


def test_after_a_failed_backward_step_closes_the_iteration(seed: int) -> None:
    """The layers behind the failure are stepped, those before it are not, and the run goes on."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = FusedLayca(model.parameters(), 0.1)
    optimizer.step_in_backward()
    first, second = (copy_of_layer(layer) for layer in model)
    with pytest.raises(OSError, match="lost"):
        model[1](Broken.apply(model[0](torch.randn(2, 3)))).sum().backward()
    assert same_bits(copy_of_layer(model[0]), first)
    assert not same_bits(copy_of_layer(model[1]), second)
    optimizer.step()
    assert same_bits(copy_of_layer(model[0]), first)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert not same_bits(copy_of_layer(model[0]), first)


def copy_of_layer(layer: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in layer.parameters()]


def test_a_gradient_after_its_parameter_was_stepped_is_refused(seed: int) -> None:
    _, inside, rows = pair()
    backward(params_of(inside), rows[0])
    for param in params_of(inside)[1:]:
        param.grad = torch.ones_like(param)
    before = contents(inside)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 \(shape \(5,\).* came after backward"):
        inside.step()
    assert same_bits(contents(inside), before)


def test_grad_scaler_is_refused(seed: int) -> None:
    param = parameter(3, 2)
    with pytest.raises(ValueError, match="unscale_in_step=True: GradScaler"):
        FusedLayca([param], 0.1, unscale_in_step=True).step_in_backward()
    optimizer = FusedLayca([param], 0.1)
    handle = optimizer.step_in_backward()
    for unscale in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(param.sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="GradScaler cannot work under step_in_backward"):
            scaler.step(optimizer)
        optimizer.step()
    # One that is switched off does nothing.
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.scale(param.sum()).backward()
    off.step(optimizer)
    handle.remove()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)


def test_what_is_wrong_with_a_group_is_found_before_anything_moves(seed: int) -> None:
    _, inside, rows = pair()
    train_in_backward(inside, rows[:1])
    before = contents(inside)
    inside.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr=-1"):
        backward(params_of(inside), rows[1])
    inside.param_groups[0]["lr"] = 0.1
    inside.zero_grad()
    inside.step()
    assert same_bits(contents(inside), before)


def test_a_layer_that_cannot_turn_is_named_and_keeps_its_gradient(seed: int) -> None:
    named = [("head", parameter(2, 3)), ("zero", Parameter(torch.zeros(2, 2)))]
    optimizer = FusedLayca(named, 0.1)
    optimizer.step_in_backward()
    head, zero = params_of(optimizer)
    before = head.detach().clone()
    with pytest.raises(ValueError, match=r"parameter 'zero' \(shape \(2, 2\)"):
        (zero.sum() + head.square().sum()).backward()
    assert same_bits(head.detach(), before)
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="parameter 'zero'"):
        zero.sum().backward()
    with pytest.raises(ValueError, match="parameter 'zero'"):
        optimizer.step()
    optimizer.param_groups[0]["rotate"] = False
    optimizer.step()
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.1))
    assert head.grad is zero.grad is None
    anonymous = FusedLayca([parameter(2, 3), Parameter(torch.zeros(2, 2))], 0.1)
    anonymous.step_in_backward()
    with pytest.raises(ValueError, match=r"in parameter 1 of group 0 \(shape"):
        params_of(anonymous)[1].sum().backward()


@native_backends
def test_weights_that_are_needed_again_in_the_same_backward_are_missed(backend: str, seed: int) -> None:
    """Autograd notices that its saved weights have changed, as it does after any step."""
    weight, x = parameter(3, 3), torch.randn(2, 3, requires_grad=True)
    optimizer = FusedLayca([weight], 0.1, backend=backend)
    optimizer.step_in_backward()
    frozen = x @ weight.detach()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (frozen.tanh() @ weight).sum().backward()


def test_a_capture_is_refused(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, inside, rows = pair(capturable=True, lr=torch.tensor(0.1))
    train_in_backward(inside, rows[:1])
    before = contents(inside)
    with monkeypatch.context() as patched:
        patched.setattr("layca_fast.in_backward.handle.is_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="cannot be part of a CUDA graph"):
            backward(params_of(inside), rows[1])
    inside.zero_grad()
    assert same_bits(contents(inside), before)
    inside.sync_hyperparameters()
    train_in_backward(inside, rows[1:2])


def test_without_the_optimizer_the_hooks_do_nothing(seed: int) -> None:
    param = parameter(3, 2)
    optimizer = FusedLayca([param], 0.1)
    handle = optimizer.step_in_backward()
    before = param.detach().clone()
    del optimizer
    gc.collect()
    param.sum().backward()
    assert same_bits(param.detach(), before)
    assert param.grad is not None
    handle.remove()
