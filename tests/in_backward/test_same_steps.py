"""Stepping inside backward: the weights and state of ordinary steps, without ever having all gradients."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layca_fast import FusedLayca

from ..support import (
    clones,
    every_backend,
    mixed_optimizer,
    mixed_params,
    native_backends,
    parameter,
    params_of,
    random_gradients,
    same_bits,
    train,
)
from .support import assert_same, backward, pair, train_in_backward


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weights_and_state_are_those_of_ordinary_steps(backend: str, dtype: torch.dtype, seed: int) -> None:
    """Four groups of three bases and both rules, with gradients that are missing now and then, under a scheduler."""
    params = mixed_params(backend, dtype)
    ordinary, inside = (mixed_optimizer(clones(params), backend) for _ in range(2))
    inside.step_in_backward()
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (ordinary, inside)]
    rows: list[list[Any]] = random_gradients(params, 4)
    rows[0][1] = rows[1][0] = rows[1][4] = rows[3][2] = None
    for row in rows:
        train(ordinary, [row])
        train_in_backward(inside, [row])
        for scheduler in schedulers:
            scheduler.step()
        assert_same(inside, ordinary)
    for ours, theirs in zip(params_of(inside), params_of(ordinary), strict=True):
        assert same_bits(vars(inside.rotation_stats()[ours]), vars(ordinary.rotation_stats()[theirs]))


def deep_model(width: int = 64, depth: int = 12) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))


def test_the_gradients_are_never_all_alive(seed: int) -> None:
    """Seen by the hooks of a user, which come before ours: the bytes of the gradient tensors that still exist."""
    model, seen, peak = deep_model(), [], 0
    layer = 4 * model[0].weight.numel()

    def count(param: Tensor) -> None:
        nonlocal peak
        seen.append(weakref.ref(param.grad))
        alive = {id(grad): grad for grad in (ref() for ref in seen) if grad is not None}
        peak = max(peak, sum(grad.untyped_storage().nbytes() for grad in alive.values()))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    optimizer = FusedLayca(model.parameters(), 0.1, momentum=0.9)
    x = torch.randn(2, 64)
    model(x).square().mean().backward()
    assert peak == len(model) * layer, "the test does not see the gradients of an ordinary backward"
    optimizer.step()
    optimizer.zero_grad()
    seen.clear()
    peak = 0
    with optimizer.step_in_backward():
        model(x).square().mean().backward()
    assert len(seen) == len(model)
    assert peak <= 2 * layer


def peak_bytes(run: Any) -> int:
    """The most memory that torch had allocated during ``run()`` beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_peak_memory_shrinks_by_the_gradients(seed: int) -> None:
    model = deep_model(256, 12)
    total = sum(4 * param.numel() for param in model.parameters())
    optimizer = FusedLayca(model.parameters(), 0.1, momentum=0.9, backend="cpu")
    x = torch.randn(2, 256)

    def iteration() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    iteration()
    ordinary = peak_bytes(iteration)
    optimizer.step_in_backward()
    iteration()
    inside = peak_bytes(iteration)
    assert ordinary > total
    assert inside < total / 4


def test_tied_weights_are_stepped_once_by_the_sum_of_their_gradients(seed: int) -> None:
    def make(inside: bool) -> tuple[nn.Module, FusedLayca]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        optimizer = FusedLayca(model.parameters(), 0.1, base="adam")
        if inside:
            optimizer.step_in_backward()
        return model, optimizer

    models = [make(inside) for inside in (False, True)]
    for _ in range(3):
        x = torch.randn(4, 6)
        for model, optimizer in models:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    models[0][1].zero_grad()
    assert_same(models[1][1], models[0][1])


def test_removing_gives_the_ordinary_step_back_with_the_same_statistics(seed: int) -> None:
    ordinary, _, rows = pair()
    rows[0][0][0, 0] = rows[1][0][0, 1] = rows[2][0][1, 1] = rows[3][0][2, 2] = float("nan")
    other = FusedLayca(clones(params_of(ordinary)), 0.1, momentum=0.9, backend="torch")
    train(ordinary, rows)
    train(other, rows[:1])
    other.zero_grad()
    with other.step_in_backward() as handle:
        train_in_backward(other, rows[1:2])
        with pytest.raises(RuntimeError, match="is on already"):
            other.step_in_backward()
    handle.remove()
    with other.step_in_backward():
        train_in_backward(other, rows[2:3])
    stats = other.rotation_stats()[params_of(other)[0]]
    assert stats.non_finite.tolist() == [3]
    train(other, rows[3:])
    for optimizer in (ordinary, other):
        optimizer.zero_grad()
    assert_same(other, ordinary)
    for ours, theirs in zip(params_of(other), params_of(ordinary), strict=True):
        assert same_bits(vars(other.rotation_stats()[ours]), vars(ordinary.rotation_stats()[theirs]))
    # Without hooks a backward leaves its gradients.
    backward(params_of(other), rows[0])
    assert all(param.grad is not None for param in params_of(other))


def test_parameters_that_come_later_are_stepped_in_backward_too(seed: int) -> None:
    """Added, put in the place of another, or frozen until now."""
    ordinary, inside, rows = pair()
    added, put = parameter(2, 3), parameter(4, 3)
    for optimizer in (ordinary, inside):
        params_of(optimizer)[2].requires_grad_(False)
    train(ordinary, [[*rows[0][:2], None]])
    train_in_backward(inside, [[*rows[0][:2], None]])
    for optimizer in (ordinary, inside):
        optimizer.add_param_group({"params": clones([added]), "lr": 0.03})
    more = [*rows[1][:2], None, torch.randn(2, 3)]
    train(ordinary, [more])
    train_in_backward(inside, [more])
    gone = params_of(inside)[0]
    for optimizer in (ordinary, inside):
        params_of(optimizer)[2].requires_grad_(True)
        optimizer.param_groups[0]["params"][0] = clones([put])[0]
    # The first step after these changes finds what no hook has stepped.
    for row in random_gradients(params_of(ordinary), 2):
        train(ordinary, [row])
        train_in_backward(inside, [row])
        for optimizer in (ordinary, inside):
            optimizer.state.pop(gone, None)
    backward(params_of(inside), random_gradients(params_of(ordinary), 1)[0])
    assert all(param.grad is None for param in params_of(inside))
    gone.sum().backward()
    assert gone.grad is not None


def test_copies_and_pickles_take_ordinary_steps(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = FusedLayca(model.parameters(), 0.1, momentum=0.9)
    optimizer.step_in_backward()
    x = torch.randn(5, 3)
    model(x).sum().backward()
    optimizer.step()
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    model(x).sum().backward()
    optimizer.step()
    for other, copied in pairs:
        other(x).sum().backward()
        assert all(param.grad is not None for param in other.parameters())
        copied.step()
        copied.zero_grad()
        assert_same(copied, optimizer)


@native_backends
def test_state_may_be_loaded_and_radii_reset_between_steps(backend: str, seed: int) -> None:
    ordinary, inside, rows = pair(backend)
    train(ordinary, rows[:2])
    train_in_backward(inside, rows[:1])
    file = io.BytesIO()
    torch.save(ordinary.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for ours, theirs in zip(params_of(inside), params_of(ordinary), strict=True):
            ours.copy_(theirs)
    inside.load_state_dict(torch.load(file, weights_only=True))
    train(ordinary, rows[2:3])
    train_in_backward(inside, rows[2:3])
    for optimizer in (ordinary, inside):
        optimizer.reset_radius()
        optimizer.param_groups[0]["lr"] = 0.01
    train(ordinary, rows[3:])
    train_in_backward(inside, rows[3:])
    ordinary.zero_grad()
    assert_same(inside, ordinary)


def test_state_that_was_replaced_is_freed(seed: int) -> None:
    """Also that of ordinary steps before."""
    ordinary, _, rows = pair()
    train(ordinary, rows[:1])
    ordinary.zero_grad()
    ordinary.step_in_backward()
    for row in rows[1:3]:
        old = [weakref.ref(ordinary.state[param]["momentum_buffer"]) for param in params_of(ordinary)]
        ordinary.load_state_dict(ordinary.state_dict())
        train_in_backward(ordinary, [row])
        gc.collect()
        assert all(ref() is None for ref in old)


def test_a_closure_may_run_the_backward(seed: int) -> None:
    ordinary, inside, rows = pair()
    for row in rows:
        train(ordinary, [row])

        def closure(row: Sequence[Tensor] = row) -> float:
            inside.zero_grad()
            backward(params_of(inside), row)
            return 7.0

        assert inside.step(closure) == 7.0
    assert_same(inside, ordinary)


def test_gradients_set_by_hand_wait_for_step(seed: int) -> None:
    ordinary, inside, rows = pair()
    for row in rows:
        train(ordinary, [row])
        backward(params_of(inside), [row[0], None, None])
        for param, grad in list(zip(params_of(inside), row, strict=True))[1:]:
            param.grad = grad.clone()
        inside.step()
    assert_same(inside, ordinary)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(reentrant: bool, seed: int) -> None:
    """Reentrant ones run backward passes inside of backward, which are no second one."""
    results = []
    for inside in (False, True):
        torch.manual_seed(seed)
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        head = nn.Linear(4, 1)
        optimizer = FusedLayca([*blocks.parameters(), *head.parameters()], 0.1, momentum=0.9)
        if inside:
            optimizer.step_in_backward()
        for _ in range(3):
            x = torch.randn(5, 4, requires_grad=True)
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            optimizer.zero_grad()
            head(x).square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()
        results.append(optimizer)
    assert_same(*results)
