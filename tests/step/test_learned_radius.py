"""radius="learned": the norm follows the radial part of the gradient, and nothing else of the step changes."""

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler

from layca_fast import FusedLayca, attach
from layca_fast.commands.cases import BASE_OPTIONS
from layca_fast.commands.verify import angle_between, angle_tolerance

from ..support import (
    clones,
    contents,
    every_backend,
    native_backends,
    norm_of,
    parameter,
    params_of,
    random_gradients,
    same_bits,
    train,
)
from .capture_support import compare_replays

LEARNED: dict[str, Any] = {"radius": "learned", "radius_lr": 4.0}


def cosine(param: Tensor, grad: Tensor) -> float:
    w, g = param.detach().double().flatten(), grad.double().flatten()
    return float(w @ g / (w.norm() * g.norm()))


@pytest.mark.parametrize("options", BASE_OPTIONS, ids=str)
@native_backends
def test_a_layer_turns_by_its_angle_and_its_norm_follows_the_gradient(
    backend: str, options: dict[str, Any], seed: int
) -> None:
    param = parameter(24, 30, backend=backend)
    optimizer = FusedLayca([param], 0.05, backend=backend, **LEARNED, **options)
    for (grad,) in random_gradients([param], 4):
        # Tilted, so that the radius has somewhere to go.
        grad += 0.5 * param.detach()
        before, expected = param.detach().clone(), norm_of(param) * math.exp(-4.0 * 0.05 * cosine(param, grad))
        train(optimizer, [[grad]])
        assert norm_of(param) == pytest.approx(expected, rel=3e-7)
        assert float(optimizer.state[param]["radius"]) == pytest.approx(expected, rel=3e-7)
        angle = angle_between(before.double().flatten(), param.detach().double().flatten())
        assert angle == pytest.approx(math.atan(0.05), rel=angle_tolerance(torch.float32, 0.05, param.numel()))


@every_backend
def test_where_the_network_knows_no_scale_no_radius_changes(backend: str, seed: int) -> None:
    """Euler: a loss that does not change with the norm of a layer has a gradient orthogonal to it."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, affine=False, eps=1e-12), nn.Linear(8, 3))
    optimizer = FusedLayca([*model.parameters()], 0.05, base="adam", backend=backend, **LEARNED)
    before, head = norm_of(model[0].weight), norm_of(model[2].weight)
    for _ in range(5):
        optimizer.zero_grad()
        inputs = torch.randn(32, 6)
        (model(inputs) - inputs[:, :3]).square().mean().backward()
        optimizer.step()
    assert norm_of(model[0].weight) == pytest.approx(before, rel=1e-5)
    assert abs(norm_of(model[2].weight) / head - 1) > 1e-3


@native_backends
def test_the_rate_of_the_radius_follows_the_schedule_of_lr(backend: str, seed: int) -> None:
    param = parameter(9, 7, backend=backend)
    optimizer = FusedLayca([param], 0.1, backend=backend, **LEARNED)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: (1.0, 0.5, 0.1, 0.0)[step])
    for share, (grad,) in zip((1.0, 0.5, 0.1), random_gradients([param], 3), strict=True):
        grad += param.detach()
        expected = norm_of(param) * math.exp(-4.0 * 0.1 * share * cosine(param, grad))
        train(optimizer, [[grad]])
        schedule.step()
        assert norm_of(param) == pytest.approx(expected, rel=3e-7)


def test_no_rate_changes_a_radius_by_more_than_a_factor_of_e(seed: int) -> None:
    param = parameter(9, 7)
    optimizer = FusedLayca([param], 0.5, base="adam", radius="learned", radius_lr=1e6)
    grad = torch.randn(9, 7) + param.detach()
    expected = norm_of(param) * math.exp(-cosine(param, grad))
    train(optimizer, [[grad]])
    assert norm_of(param) == pytest.approx(expected, rel=3e-7)


@every_backend
def test_what_does_not_move_keeps_its_radius(backend: str, seed: int) -> None:
    params = [parameter(5, 4, backend=backend) for _ in range(3)]
    optimizer = FusedLayca(params, 0.1, momentum=0.9, backend=backend, **LEARNED)
    train(optimizer, random_gradients(params, 2))
    before = contents(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, [[params[0].detach().clone(), None, torch.randn(5, 4)]])
    after = contents(optimizer)
    assert all(same_bits(old[0], new[0]) for old, new in zip(before, after, strict=True))
    assert all(same_bits(old[2]["radius"], new[2]["radius"]) for old, new in zip(before, after, strict=True))


@native_backends
def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(backend: str, seed: int) -> None:
    params = [parameter(6, 5, backend=backend), parameter(4, 3, 2, backend=backend)]
    rows = random_gradients(params, 6)
    optimizer = FusedLayca(params, 0.1, base="adam", backend=backend, **LEARNED)
    train(optimizer, rows[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = FusedLayca(clones(params), 0.2, base="adam", backend=backend)
    train(optimizer, rows[3:])
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, rows[3:])
    assert same_bits(contents(resumed), contents(optimizer))


@every_backend
def test_captured_steps_replay_as_eager_ones(backend: str, capturing: Callable[[bool], None], seed: int) -> None:
    params = [parameter(5, 4, backend=backend), parameter(7, backend=backend)]
    captured, eager = (
        FusedLayca(each, torch.tensor(0.1), base="adam", backend=backend, capturable=True, **LEARNED)
        for each in (params, clones(params))
    )
    rows = random_gradients(params, 5)
    for optimizer in (captured, eager):
        train(optimizer, rows[:1])
    for _ in compare_replays(captured, eager, rows[1:], capturing):
        pass


@native_backends
def test_scaled_gradients_unscaled_in_the_step_give_the_bits_of_plain_ones(backend: str, seed: int) -> None:
    params = [parameter(5, 4, backend=backend)]
    scaled = FusedLayca(params, 0.1, momentum=0.9, backend=backend, unscale_in_step=True, **LEARNED)
    plain = FusedLayca(clones(params), 0.1, momentum=0.9, backend=backend, **LEARNED)
    scaled.grad_scale, scaled.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for (grad,) in random_gradients(params, 3):
        train(scaled, [[grad * 8]])
        train(plain, [[grad]])
        assert same_bits(contents(scaled)[0][0], contents(plain)[0][0])
    before = contents(scaled)
    scaled.found_inf.fill_(1.0)
    train(scaled, [[torch.full((5, 4), math.inf)]])
    assert same_bits([before[0][0], before[0][2]], [contents(scaled)[0][0], contents(scaled)[0][2]])


@native_backends
def test_stepping_in_backward_gives_the_bits_of_ordinary_steps(backend: str, seed: int) -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    model.load_state_dict(plain.state_dict())
    optimizers = [FusedLayca(each.parameters(), 0.1, backend=backend, **LEARNED) for each in (plain, model)]
    optimizers[1].step_in_backward()
    for inputs in torch.randn(3, 16, 6).unbind():
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            each(inputs).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(params_of(optimizers[1]), params_of(optimizers[0]), strict=True):
        assert same_bits(ours, theirs)
        assert same_bits(dict(optimizers[1].state[ours]), dict(optimizers[0].state[theirs]))


@pytest.mark.parametrize(
    ("rate", "error"), [(-0.1, ValueError), (math.inf, ValueError), (math.nan, ValueError), ("x", TypeError)]
)
def test_a_rate_that_is_none_is_refused(rate: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"radius_lr=.*must be"):
        FusedLayca([parameter(3, 3)], 0.1, radius="learned", radius_lr=rate)


def test_attach_refuses_learned_radii_and_names_what_has_them() -> None:
    with pytest.raises(ValueError, match=r"radius='learned'.*FusedLayca"):
        attach(SGD([parameter(3, 3)], 0.1), radius="learned")
