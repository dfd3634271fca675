"""Layca attached to torch's optimizers: what a step does to the weights."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

from layca_fast import FusedLayca, attach, detach
from layca_fast.attach import exchange
from layca_fast.commands.verify import angle_between, angle_tolerance, layers_of
from layca_fast.formulas.options import RULES
from layca_fast.reference import layca

from ..support import (
    assert_close,
    clones,
    contents,
    copy_of,
    every_backend,
    parameter,
    params_of,
    random_gradients,
    relative_distance,
    same_bits,
    train,
)
from .support import OPTIMIZERS, all_layers, new_params

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_rule = pytest.mark.parametrize("rule", RULES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@both_dtypes
@every_optimizer
def test_every_layer_turns_by_atan_of_lr_and_keeps_its_norm(name: str, dtype: torch.dtype, seed: int) -> None:
    optimizer = OPTIMIZERS[name](new_params(name, dtype), lr=0.03)
    attach(optimizer)
    norms = [layer.norm() for layer in all_layers(optimizer)]
    for row in random_gradients(params_of(optimizer), 200):
        before = all_layers(optimizer)
        train(optimizer, [row])
        for old, new, norm in zip(before, all_layers(optimizer), norms, strict=True):
            allowed = angle_tolerance(dtype, 0.03, old.numel())
            assert angle_between(old, new) == pytest.approx(math.atan(0.03), rel=allowed)
            assert float(new.norm()) == pytest.approx(float(norm), rel=1e-12 if dtype == torch.float64 else 2e-7)


@every_optimizer
def test_the_norm_is_kept_under_every_rule(name: str, seed: int) -> None:
    for rule in RULES:
        optimizer = OPTIMIZERS[name](new_params(name, torch.float32), lr=0.03)
        attach(optimizer, rule)
        norms = [float(layer.norm()) for layer in all_layers(optimizer)]
        train(optimizer, random_gradients(params_of(optimizer), 300))
        assert [float(layer.norm()) for layer in all_layers(optimizer)] == pytest.approx(norms, rel=2e-7)


@every_optimizer
def test_a_layer_turns_in_the_direction_of_the_optimizers_own_step(name: str, seed: int) -> None:
    """Beside a plain copy of the optimizer at every step, and the paper's four operations on what that does."""
    optimizer = OPTIMIZERS[name](new_params(name), lr=0.03)
    attach(optimizer)
    radii = [float(param.detach().norm()) for param in params_of(optimizer)]
    for row in random_gradients(params_of(optimizer), 5):
        plain = copy.deepcopy(optimizer)
        detach(plain)
        before = [param.detach().clone() for param in params_of(optimizer)]
        train(optimizer, [row])
        train(plain, [row])
        for old, ours, theirs, radius in zip(before, params_of(optimizer), params_of(plain), radii, strict=True):
            expected = layca(old, old - theirs.detach(), 0.03, radius) if old.dim() >= 2 else theirs
            assert not torch.equal(ours, old)
            assert relative_distance(ours, expected) <= 1e-12
            if old.dim() < 2:
                assert same_bits(ours, theirs), "what does not rotate must take the optimizer's own step"


@every_rule
@pytest.mark.parametrize("radius", ["initial", "current"])
@pytest.mark.parametrize("chunks", [1, 3, "all"])
@pytest.mark.parametrize(
    "momentum", [{}, {"momentum": 0.9}, {"momentum": 0.8, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}]
)
def test_attached_sgd_equals_fused_layca(
    momentum: dict[str, Any], chunks: int | str, radius: str, rule: str, seed: int
) -> None:
    params = [parameter(*shape, dtype=torch.float64) for shape in ((6, 5), (7,), (9, 3, 2))]
    options = {"rule": rule, "chunks": chunks, "radius": radius}
    ours = SGD(params, lr=0.04, **momentum)
    attach(ours, **options)
    fused = FusedLayca(clones(params), 0.04, **momentum, **options)
    gradients = random_gradients(params, 100)
    train(ours, gradients)
    train(fused, gradients)
    for a, b in zip(params, params_of(fused), strict=True):
        assert relative_distance(a, b) <= 1e-6
    assert_close(ours, fused, tolerance=1e-6) if momentum else None


@both_dtypes
@every_backend
def test_every_backend_turns(backend: str, dtype: torch.dtype, seed: int) -> None:
    """Beside a tensor that no kernel may walk as one run of memory, and a permuted one."""
    params = [
        parameter(6, 5, backend=backend, dtype=dtype),
        Parameter(parameter(2, 3, 4, 5, backend=backend, dtype=dtype).detach().to(memory_format=torch.channels_last)),
        Parameter(parameter(8, 6, backend=backend, dtype=dtype).detach()[:, ::2]),
        parameter(5, 4, backend=backend, dtype=dtype),
    ]
    optimizer = SGD([{"params": params[:2]}, {"params": params[2:3], "backend": "torch"}, {"params": params[3:]}], 0.05)
    attach(optimizer, backend=backend)
    other = FusedLayca([{"params": clones(params)}], 0.05, backend="torch")
    gradients = random_gradients(params, 4)
    train(optimizer, gradients)
    train(other, gradients)
    for a, b in zip(params, params_of(other), strict=True):
        assert relative_distance(a, b) <= (1e-12 if dtype == torch.float64 else 1e-6)


def trajectory(make: Callable[..., Optimizer], start: Tensor, gradients: Any, rule: str, **options: Any) -> Tensor:
    param = Parameter(start.clone())
    optimizer = make([param], lr=0.05, **options)
    attach(optimizer, rule)
    train(optimizer, gradients)
    return param.detach()


@pytest.mark.parametrize(
    ("make", "options", "same"),
    [
        (AdamW, {}, True),
        (AdamW, {"amsgrad": True}, True),
        (SGD, {}, True),
        (SGD, {"momentum": 0.9}, False),
        (Adam, {}, False),
    ],
)
def test_weight_decay_leaves_the_direction_where_it_is_parallel_to_the_weights(
    make: Callable[..., Optimizer], options: dict[str, Any], same: bool, seed: int
) -> None:
    start, gradients = torch.randn(6, 5, dtype=torch.float64), [[torch.randn(6, 5)] for _ in range(50)]
    without, with_decay = (
        trajectory(make, start, gradients, "layca", weight_decay=decay, **options) for decay in (0.0, 0.3)
    )
    distance = relative_distance(with_decay, without)
    assert distance <= 1e-12 if same else distance > 1e-3


def test_decay_tilts_the_step_where_nothing_is_projected(seed: int) -> None:
    start, gradients = torch.randn(6, 5, dtype=torch.float64), [[torch.randn(6, 5)] for _ in range(50)]
    paths = [trajectory(AdamW, start, gradients, "hyperball", weight_decay=decay) for decay in (0.0, 0.3)]
    assert relative_distance(*paths) > 1e-3


@every_optimizer
def test_without_gradient_rate_or_step_the_bits_stay(name: str, seed: int) -> None:
    optimizer = OPTIMIZERS[name](new_params(name, torch.float32), lr=0.03)
    attach(optimizer)
    gradients = random_gradients(params_of(optimizer), 3)
    train(optimizer, gradients[:1])
    weights = [copy_of(param) for param in params_of(optimizer)]
    train(optimizer, [[None, *gradients[1][1:]]])
    assert same_bits(copy_of(params_of(optimizer)[0]), weights[0])
    assert not torch.equal(params_of(optimizer)[-1], weights[-1])
    weights = [copy_of(param) for param in params_of(optimizer)]
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, gradients[2:])
    assert same_bits([copy_of(param) for param in params_of(optimizer)], weights)


@every_optimizer
def test_a_first_gradient_that_comes_late_finds_the_optimizers_state_unmade(name: str, seed: int) -> None:
    """Most optimizers make a parameter's state where it is empty: a radius in it too early would break them."""
    optimizer = OPTIMIZERS[name](new_params(name), lr=0.03)
    attach(optimizer)
    gradients = random_gradients(params_of(optimizer), 3)
    late = params_of(optimizer)[0]
    before, norm = layers_of(late, 1)[0], float(late.detach().norm())
    train(optimizer, [[None, *gradients[0][1:]]])
    assert torch.equal(before, layers_of(late, 1)[0])
    assert optimizer.state.get(late, {}).get("radius", torch.zeros(1)).item() == 0
    train(optimizer, gradients[1:2])
    assert angle_between(before, layers_of(late, 1)[0]) == pytest.approx(math.atan(0.03), rel=1e-12)
    assert float(optimizer.state[late]["radius"]) == pytest.approx(norm, rel=1e-12)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, gradients[2:])


@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_exchange_in_blocks_changes_no_bit(block: int, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    params = [
        *(parameter(*shape) for shape in ((6, 5), (3, 4, 5), (2, 2), (1, 1), (4, 0))),
        parameter(5, 3, dtype=torch.float64),
        Parameter(torch.randn(8, 6)[:, ::2]),
        Parameter(torch.randn(6, 5).t()),
    ]
    gradients = random_gradients(params, 3)
    optimizers = [SGD(clones(params), 0.05, momentum=0.9)]
    # Clones of strided parameters are dense.
    optimizers.append(SGD(params, 0.05, momentum=0.9))
    attach(optimizers[0])
    monkeypatch.setattr(exchange, "BLOCK_ON_CPU", block)
    attach(optimizers[1])
    for optimizer in optimizers:
        train(optimizer, gradients)
    for ours, theirs in zip(params, params_of(optimizers[0]), strict=True):
        strided = not ours.detach().is_contiguous()
        assert relative_distance(ours, theirs) <= 1e-6 if strided else torch.equal(ours, theirs)


def test_non_finite_elements_of_the_step_count_as_zero(seed: int) -> None:
    param = parameter(8, 5)
    optimizer, fused = SGD([param], 0.05), FusedLayca(clones([param]), 0.05)
    attach(optimizer)
    grad = torch.randn(8, 5)
    grad[0, 0], grad[3, 2], grad[7, 4] = math.nan, math.inf, -math.inf
    for each in (optimizer, fused):
        train(each, [[grad]])
    assert relative_distance(param, params_of(fused)[0]) <= 1e-6
    assert bool(torch.isfinite(param).all())


def test_the_float32_rounding_of_the_step_stays_within_the_formula(seed: int) -> None:
    """u = w_before - w_after carries the rounding of w_after, at most half a unit in the last place per element."""
    eps = torch.finfo(torch.float32).eps
    for ratio in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        param = Parameter(torch.randn(200, 300))
        before = layers_of(param, 1)[0]
        optimizer = SGD([param], lr=0.5)
        attach(optimizer)
        grad = torch.randn(200, 300)
        grad *= ratio * before.norm().float() / grad.norm() / 0.5
        train(optimizer, [[grad]])
        expected = layca(before, 0.5 * layers_of(grad, 1)[0], 0.5, float(before.norm()))
        # Both turned by the same angle: the two ends are apart by the error in direction, in units of sin(atan(lr)).
        error = angle_between(expected, layers_of(param, 1)[0]) / math.sin(math.atan(0.5))
        # The second term: storing the turned weights rounds them, too.
        assert error <= 0.5 * eps / ratio + 2 * eps
        assert ratio > 1e-4 or error > 0.05 * eps / ratio, "then the documentation is too gloomy"


def test_remove_gives_the_plain_optimizer_back(seed: int) -> None:
    for name, make in OPTIMIZERS.items():
        optimizer = make(new_params(name), lr=0.03)
        handle = attach(optimizer)
        gradients = random_gradients(params_of(optimizer), 4)
        train(optimizer, gradients[:2])
        handle.remove()
        handle.remove()
        plain = make(clones(params_of(optimizer)), lr=0.03)
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert set(vars(optimizer)) == set(vars(plain)), "an attribute was left behind"
        assert all("radius" not in state for state in optimizer.state.values())
        for each in (optimizer, plain):
            train(each, gradients[2:])
        assert same_bits(contents(optimizer), contents(plain))


def test_a_removed_handle_does_not_remove_its_successor(seed: int) -> None:
    param = parameter(4, 3)
    optimizer = SGD([param], 0.1)
    with attach(optimizer) as first:
        train(optimizer, random_gradients([param], 1))
    assert not optimizer.state
    second = attach(optimizer)
    first.remove()
    before = layers_of(param, 1)[0]
    train(optimizer, random_gradients([param], 1))
    assert angle_between(before, layers_of(param, 1)[0]) == pytest.approx(math.atan(0.1), rel=1e-5)
    second.remove()


@pytest.mark.parametrize("decaying", [partial(AdamW, weight_decay=0.5), partial(SGD, weight_decay=5e-4)], ids=str)
def test_decay_alone_turns_nothing(decaying: Any, seed: int) -> None:
    """In float32 the decayed weights, once stored, lie a rounding error beside the line of the old ones."""
    param = Parameter(torch.randn(60, 50))
    before = param.detach().clone()
    optimizer = decaying([param], lr=0.1)
    attach(optimizer, chunks=3)
    for step in range(3):
        param.grad = torch.zeros_like(param)
        if step == 2:
            param.grad[20:40] = torch.randn(20, 50)
        optimizer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before.chunk(3), param.detach().chunk(3), strict=True)]
    assert moved == [False, True, False]
