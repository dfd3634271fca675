"""The rules: which way a layer turns, and how far, for any weights and steps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layca_fast import FusedLayca
from layca_fast.commands.verify import angle_between

from ..support import every_backend, native_backends, parameter, random_gradients, relative_distance, same_bits, train
from .test_properties import search


def one_step(weight: Tensor, grad: Tensor, rule: str, lr: float, backend: str) -> tuple[Tensor, FusedLayca]:
    param = weight.clone().requires_grad_()
    optimizer = FusedLayca([param], lr, rule=rule, backend=backend)
    param.grad = grad.clone()
    optimizer.step()
    return param.detach(), optimizer


def tilted(weight: Tensor, phi: float) -> Tensor:
    """A random step at an angle of ``phi`` to the weights."""
    noise = torch.randn_like(weight)
    across = noise - (noise * weight).sum() / weight.square().sum() * weight
    return 3.0 * (math.cos(phi) * weight / weight.norm() + math.sin(phi) * across / across.norm())


@native_backends
@search
@given(seed=st.integers(0, 2**31), lr=st.floats(1e-3, 4.0), phi=st.floats(1e-3, math.pi - 1e-3))
def test_hyperball_turns_by_the_angle_of_its_definition(backend: str, seed: int, lr: float, phi: float) -> None:
    """atan2(lr sin(phi), 1 - lr cos(phi)), also where the step turns the layer by more than a right angle."""
    torch.manual_seed(seed)
    weight = torch.randn(12, 15, dtype=torch.float64)
    grad = tilted(weight, phi)
    after, optimizer = one_step(weight, grad, "hyperball", lr, backend)
    expected = math.atan2(lr * math.sin(phi), 1 - lr * math.cos(phi))
    assert angle_between(weight.flatten(), after.flatten()) == pytest.approx(expected, rel=1e-9)
    moved = weight - lr * weight.norm() * grad / grad.norm()
    assert relative_distance(after, moved * (weight.norm() / moved.norm())) <= 1e-12
    stats = next(iter(optimizer.rotation_stats().values()))
    assert float(stats.angle) == pytest.approx(expected, rel=1e-6)


@every_backend
def test_the_rules_agree_where_the_step_is_orthogonal_and_only_there(backend: str, seed: int) -> None:
    weight = torch.randn(9, 9, dtype=torch.float64)
    for phi, same in ((math.pi / 2, True), (1.0, False)):
        grad = tilted(weight, phi)
        layca, ball = (one_step(weight, grad, rule, 0.2, backend)[0] for rule in ("layca", "hyperball"))
        assert (relative_distance(layca, ball) <= 1e-14) == same


@every_backend
@pytest.mark.parametrize("factor", [-2.0, 0.5, 1e20])
def test_hyperball_keeps_a_layer_that_has_no_direction(backend: str, factor: float, seed: int) -> None:
    weight = torch.randn(20, 7)
    after, optimizer = one_step(weight, factor * weight, "hyperball", 0.5, backend)
    assert same_bits(after, weight)
    stats = next(iter(optimizer.rotation_stats().values()))
    assert (int(stats.no_direction), float(stats.angle), float(stats.radius)) == (1, 0.0, 0.0)


@native_backends
def test_each_group_has_its_rule_and_may_change_it(backend: str, seed: int) -> None:
    params = [parameter(5, 6, backend=backend, dtype=torch.float64) for _ in range(2)]
    optimizer = FusedLayca(
        [{"params": params[:1]}, {"params": params[1:], "rule": "hyperball"}], 0.3, momentum=0.9, backend=backend
    )
    twins = [param.detach().clone().requires_grad_() for param in params]
    others = [FusedLayca([twin], 0.3, momentum=0.9, backend=backend) for twin in twins]
    rules = (("layca", "hyperball"), ("hyperball", "layca"))
    for pair, row in zip(rules, random_gradients(params, 2), strict=True):
        for group, other, rule, grad in zip(optimizer.param_groups, others, pair, row, strict=True):
            group["rule"] = other.param_groups[0]["rule"] = rule
            train(other, [[grad]])
        train(optimizer, [row])
    assert same_bits([param.detach() for param in params], [twin.detach() for twin in twins])


@native_backends
def test_hyperball_keeps_the_norm_over_1000_steps(backend: str, seed: int) -> None:
    param = parameter(16, 9, backend=backend)
    norm = float(param.detach().double().norm())
    optimizer = FusedLayca([param], 0.03, base="adam", rule="hyperball", backend=backend)
    noise = random_gradients([param], 50)
    for _ in range(20):
        train(optimizer, noise)
    assert float(param.detach().double().norm()) == pytest.approx(norm, rel=2e-7)
