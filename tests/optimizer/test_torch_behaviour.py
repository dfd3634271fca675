"""FusedLayca is a torch.optim.Optimizer: what users and trainers do to one works, and does what it says."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from layca_fast import FusedLayca

from ..support import (
    assert_close,
    contents,
    every_backend,
    native_backends,
    parameter,
    params_of,
    random_gradients,
    same_bits,
    train,
)


def small_network() -> nn.Module:
    """Convolution, normalization and a matrix: tensors that rotate and tensors that do not."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.LayerNorm(5)
    )


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs), labels)


def batch(size: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 2, 6, 6), torch.randint(5, (size,))


@pytest.mark.parametrize(
    "options", [{"momentum": 0.9, "nesterov": True}, {"base": "sgd_amom", "momentum": 0.8}], ids=["sgd", "sgd_amom"]
)
@native_backends
def test_a_plain_training_loop_learns(backend: str, options: dict[str, Any], seed: int) -> None:
    """Clusters that a small network must tell apart; every loss is that of the weights that the last step made."""
    labels = torch.arange(5).repeat(6)
    inputs = torch.randn(5, 8)[labels] + 0.1 * torch.randn(30, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 5))
    optimizer = FusedLayca(model.parameters(), 0.1, backend=backend, **options)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = loss_of(model, inputs, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@native_backends
def test_a_closure_is_run_with_gradients_and_its_loss_returned(backend: str, seed: int) -> None:
    model = small_network()
    inputs, labels = batch()
    optimizer = FusedLayca(model.parameters(), 0.05, momentum=0.9, backend=backend)
    seen = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        seen.append(loss_of(model, inputs, labels))
        seen[-1].backward()
        return seen[-1]

    before = model[0].weight.detach().clone()
    with torch.no_grad():
        returned = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert returned is seen[0]
    assert len(seen) == 1
    assert not torch.equal(model[0].weight, before)
    assert optimizer.step() is None


def test_step_hooks_run_around_the_step_in_torchs_order(seed: int) -> None:
    param = parameter(3, 4)
    optimizer = FusedLayca([param], 0.1, momentum=0.9, backend="torch")
    param.grad = torch.randn_like(param)
    start, events = param.detach().clone(), []

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: events.append((name, torch.equal(param, start)))

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in events]
    assert sorted(names) == ["global post", "global pre", "post", "pre"]
    assert [unmoved for _, unmoved in events] == [True, True, False, False]
    optimizer.step()
    assert len(events) == 4, "a removed hook still runs"


@every_backend
def test_a_pre_step_hook_may_change_gradients_and_rates(backend: str, seed: int) -> None:
    first, second = parameter(4, 3, backend=backend), parameter(4, 3, backend=backend)
    second.data.copy_(first.data)
    hooked = FusedLayca([first], 0.5, momentum=0.9, backend=backend)
    plain = FusedLayca([second], 0.1, momentum=0.9, backend=backend)

    def negate(optimizer: FusedLayca, args: Any, kwargs: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.1
        for param in params_of(optimizer):
            param.grad = -param.grad

    hooked.register_step_pre_hook(negate)
    grads = random_gradients([first], 3)
    train(hooked, grads)
    train(plain, [[-grad for grad in row] for row in grads])
    assert same_bits(contents(hooked), contents(plain))


def test_zero_grad_both_ways_and_the_gradient_is_then_free(seed: int) -> None:
    param, bias = parameter(3, 4), parameter(5)
    optimizer = FusedLayca([param, bias], 0.1, momentum=0.9, backend="torch")
    train(optimizer, random_gradients([param, bias], 2))
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in (param, bias))
    gone = weakref.ref(param.grad)
    optimizer.zero_grad()
    assert param.grad is None
    assert bias.grad is None
    gc.collect()
    assert gone() is None, "something still holds the gradient's memory"


@every_backend
def test_the_gradient_is_never_modified(backend: str, seed: int) -> None:
    """Non-finite elements count as zero, under maximize the sign turns, and still .grad stays as it was."""
    params = [parameter(6, 5, backend=backend), parameter(7, backend=backend), parameter(3, 4, 2, backend=backend)]
    optimizer = FusedLayca(params, 0.1, momentum=0.9, nesterov=True, maximize=True, backend=backend)
    grads = random_gradients(params, 1)[0]
    grads[0][2, 3], grads[1][4] = float("nan"), float("-inf")
    grads[2] = grads[2].transpose(0, 1).contiguous().transpose(0, 1)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone(memory_format=torch.preserve_format)
    objects, versions = [param.grad for param in params], [param.grad._version for param in params]
    optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params, objects, strict=True))
    assert [grad._version for grad in objects] == versions
    assert same_bits(objects, grads)


@every_backend
def test_autograd_notices_that_the_weights_moved(backend: str, seed: int) -> None:
    """A graph from before the step would give wrong gradients: torch refuses it only if the step counts as in-place."""
    weight, scale = parameter(4, 4, backend=backend), parameter(4, backend=backend)
    optimizer = FusedLayca([weight, scale], 0.1, momentum=0.9, backend=backend)
    loss = ((torch.randn(3, 4).to(weight) @ weight) * scale).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@native_backends
def test_grad_scalers_standard_path(backend: str, dtype: torch.dtype, seed: int) -> None:
    """Unscale, clip, step: the rotation must be that of the clipped gradients, and infinite ones must skip the step."""
    model = small_network()
    inputs, labels = batch()
    optimizer = FusedLayca(model.parameters(), 0.05, momentum=0.9, backend=backend)
    twin = [param.detach().clone().requires_grad_() for param in model.parameters()]
    plain = FusedLayca(twin, 0.05, momentum=0.9, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, inputs, labels)
        scaler.scale(loss).backward()
        if step == 2:
            next(model.parameters()).grad[0, 0, 0, 0] = float("inf")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        grads, before = [param.grad.clone() for param in model.parameters()], contents(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert same_bits(contents(optimizer), before), "a step with infinite gradients must be skipped"
        else:
            train(plain, [grads])
            assert same_bits(contents(optimizer), contents(plain))


@native_backends
def test_gradients_may_accumulate_and_be_clipped_in_place(backend: str, seed: int) -> None:
    model, twin = small_network(), small_network()
    model[1].eval()
    twin.load_state_dict(model.state_dict())
    twin[1].eval()
    inputs, labels = batch(12)
    optimizers = [FusedLayca(each.parameters(), 0.05, momentum=0.9, backend=backend) for each in (model, twin)]
    for _ in range(3):
        for start in range(0, 12, 4):
            part = slice(start, start + 4)
            (loss_of(model, inputs[part], labels[part]) / 3).backward()
        loss_of(twin, inputs, labels).backward()
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            norm = nn.utils.clip_grad_norm_(each.parameters(), 0.05)
            assert norm > 0.05
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert_close(*optimizers, tolerance=1e-5)


def test_a_step_without_any_gradient_does_nothing(seed: int) -> None:
    param = parameter(3, 4)
    optimizer = FusedLayca([param], 0.1, momentum=0.9, backend="torch")
    before = contents(optimizer)
    optimizer.step()
    assert same_bits(contents(optimizer), before)
    assert optimizer.rotation_stats() == {}


def test_an_optimizer_and_its_tables_are_freed_with_their_last_reference(seed: int) -> None:
    param = parameter(3, 4)
    optimizer = FusedLayca([param], 0.1, momentum=0.9, backend="torch")
    train(optimizer, random_gradients([param], 2))
    gone = [weakref.ref(optimizer), weakref.ref(optimizer.state[param]["momentum_buffer"])]
    del optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
