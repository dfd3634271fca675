"""joins_at: a layer takes plain base steps until its norm has reached a stated value, and then turns on that sphere."""

import io
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Adam

from layca_fast import FusedLayca, attach
from layca_fast.commands.cases import BASE_OPTIONS
from layca_fast.commands.verify import angle_between, angle_tolerance
from layca_fast.reference import reference_step

from ..support import (
    clones,
    contents,
    device_of,
    every_backend,
    native_backends,
    norm_of,
    parameter,
    relative_distance,
    same_bits,
    train,
)
from .capture_support import compare_replays


def steady_gradients(params: Sequence[Tensor], steps: int) -> list[list[Tensor]]:
    """Random, with a mean of their own, so that what follows them grows in any run."""
    means = [torch.randn(param.shape, dtype=param.dtype) for param in params]
    return [
        [(mean + 0.5 * torch.randn(mean.shape, dtype=mean.dtype)).to(param.device) for mean, param in pairs]
        for pairs in [list(zip(means, params, strict=True))] * steps
    ]


def zeros(*shape: int, backend: str = "torch", dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.zeros(shape, dtype=dtype, device=device_of(backend)))


@pytest.mark.parametrize(
    ("chunks", "radius", "rule"),
    [(1, "initial", "layca"), (2, "initial", "hyperball"), ("all", "current", "layca"), (2, "learned", "layca")],
    ids=str,
)
@every_backend
def test_steps_are_those_of_the_reference_before_and_after(
    backend: str, chunks: Any, radius: str, rule: str, seed: int
) -> None:
    """One layer after the other joins, and those that wait are left alone by what the others do."""
    param = zeros(4, 6, backend=backend)
    options = {"chunks": chunks, "radius": radius, "rule": rule, "momentum": 0.5, "joins_at": 1.5}
    optimizer = FusedLayca([param], 0.2, backend=backend, **options)
    weight, state = param.detach().double().cpu(), dict[str, Any]()
    waiting = set()
    for (grad,) in steady_gradients([param], 10 if backend == "triton" else 16):
        train(optimizer, [[grad]])
        reference_step(weight, grad.double().cpu(), state, lr=0.2, **options)
        assert relative_distance(param, weight) < 1e-6
        radii = optimizer.state[param]["radius"].tolist()
        for known, expected in zip(radii, state["radius"], strict=True):
            assert known == (-1.5 if expected is None else pytest.approx(expected, rel=1e-6))
            assert expected is None or expected >= 1.5 or radius == "learned"
        waiting.add(sum(known < 0 for known in radii))
    assert {0, len(radii)} <= waiting or chunks == "all"


@pytest.mark.parametrize("options", BASE_OPTIONS, ids=str)
@native_backends
def test_a_layer_that_waits_takes_the_bits_of_plain_steps_then_turns_at_its_norm(
    backend: str, options: dict[str, Any], seed: int
) -> None:
    waits, plain = zeros(24, 30, backend=backend), zeros(24, 30, backend=backend)
    lr = 0.05
    optimizer = FusedLayca([waits], lr, backend=backend, joins_at=3.0, **options)
    resting = FusedLayca([plain], lr, backend=backend, rotate=False, **options)
    rows = iter(steady_gradients([waits], 200))
    while norm_of(waits) < 3.0:
        row = next(rows)
        train(optimizer, [row])
        train(resting, [row])
        assert same_bits(waits.detach(), plain.detach())
        stats = optimizer.rotation_stats()[waits]
        assert [float(stats.angle), float(stats.radius), float(stats.drift)] == [0.0, 0.0, 0.0]
    norm = norm_of(waits)
    for row in islice(rows, 3):
        before = waits.detach().clone()
        train(optimizer, [row])
        assert norm_of(waits) == pytest.approx(norm, rel=3e-7)
        angle = angle_between(before.double().flatten(), waits.detach().double().flatten())
        assert angle == pytest.approx(math.atan(lr), rel=angle_tolerance(torch.float32, lr, waits.numel()))
        stats = optimizer.rotation_stats()[waits]
        assert float(stats.angle) == pytest.approx(math.atan(lr))
        assert float(stats.radius) == pytest.approx(norm, rel=1e-12)
        assert abs(float(stats.drift)) < 1e-6


@native_backends
def test_a_layer_of_that_norm_already_turns_from_the_start(backend: str, seed: int) -> None:
    param, other = parameter(5, 4, backend=backend), parameter(5, 4, backend=backend)
    with torch.no_grad():
        other.copy_(param)
    norm = norm_of(param)
    rows = steady_gradients([param], 3)
    train(FusedLayca([param], 0.1, backend=backend, joins_at=norm / 2), rows)
    train(FusedLayca([other], 0.1, backend=backend), rows)
    assert same_bits(param.detach(), other.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_backend
def test_sixteen_bits_with_their_remainder_take_the_steps_of_float32(
    backend: str, dtype: torch.dtype, seed: int
) -> None:
    param, single = zeros(4, 5, backend=backend, dtype=dtype), zeros(4, 5, backend=backend)
    optimizers = [FusedLayca([each], 0.03, momentum=0.9, joins_at=0.5, backend=backend) for each in (param, single)]
    for (grad,) in steady_gradients([single], 12):
        grad = grad.to(dtype)
        train(optimizers[0], [[grad]])
        train(optimizers[1], [[grad.float()]])
    assert float(optimizers[1].state[single]["radius"]) > 0
    assert relative_distance(optimizers[0].effective_weight(param), single) < 1e-4


@pytest.mark.parametrize("saved_after", [0, 1, 30], ids=["at the start", "while it waits", "once it has joined"])
@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"base": "adam"}, {"base": "muon"}], ids=str)
@native_backends
def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(
    backend: str, options: dict[str, Any], saved_after: int, seed: int
) -> None:
    params = [zeros(6, 5, backend=backend), parameter(4, 5, backend=backend)]
    rows = steady_gradients(params, 36)
    optimizer = FusedLayca(params, 0.02, joins_at=0.5, backend=backend, **options)
    train(optimizer, rows[:saved_after])
    radius = float(optimizer.state[params[0]].get("radius", -1)) if saved_after else -1.0
    assert (radius > 0) == (saved_after == 30)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = FusedLayca(clones(params), 0.2, backend=backend, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for each in (optimizer, resumed):
        train(each, rows[saved_after:])
    assert float(optimizer.state[params[0]]["radius"]) > 0
    assert same_bits(contents(resumed), contents(optimizer))


def test_what_was_saved_once_it_no_longer_waits_turns_when_it_is_loaded(seed: int) -> None:
    """The state still says what it waited for: no step was taken since."""
    param = zeros(4, 3)
    optimizer = FusedLayca([("branch", param)], 0.01, joins_at=5.0)
    train(optimizer, steady_gradients([param], 1))
    optimizer.param_groups[0]["joins_at"] = 0.0
    (twin,) = clones([param])
    loaded = FusedLayca([("branch", twin)], 0.01)
    loaded.load_state_dict(optimizer.state_dict())
    norm = norm_of(param)
    rows = steady_gradients([param], 2)
    for each in (optimizer, loaded):
        train(each, rows)
    assert norm_of(twin) == pytest.approx(norm, rel=1e-6)
    assert same_bits(contents(loaded), contents(optimizer))


@native_backends
def test_the_norm_to_wait_for_may_be_a_function_and_change_with_the_group(backend: str, seed: int) -> None:
    param = zeros(9, 4, backend=backend)
    optimizer = FusedLayca([param], 0.1, joins_at=lambda shape: shape[0] / shape[1], backend=backend)
    train(optimizer, steady_gradients([param], 1))
    assert optimizer.state[param]["radius"].tolist() == [-2.25]
    optimizer.param_groups[0]["joins_at"] = norm_of(param) / 2
    train(optimizer, steady_gradients([param], 1))
    assert float(optimizer.state[param]["radius"]) > 0
    optimizer.param_groups[0]["joins_at"] = 1e3
    norm = norm_of(param)
    train(optimizer, steady_gradients([param], 1))
    assert norm_of(param) == pytest.approx(norm, rel=1e-6), "what has joined stays"
    optimizer.reset_radius()
    train(optimizer, steady_gradients([param], 1))
    assert optimizer.state[param]["radius"].tolist() == [-1e3], "until reset_radius()"


def test_zeros_that_no_longer_wait_turn_from_the_next_step_on(seed: int) -> None:
    param = zeros(5, 4)
    optimizer = FusedLayca([param], 0.1, joins_at=100.0)
    train(optimizer, steady_gradients([param], 2))
    norm = norm_of(param)
    optimizer.param_groups[0]["joins_at"] = 0.0
    train(optimizer, steady_gradients([param], 2))
    assert norm_of(param) == pytest.approx(norm, rel=1e-6)


@every_backend
def test_captured_steps_replay_as_eager_ones(backend: str, capturing: Callable[[bool], None], seed: int) -> None:
    params = [zeros(5, 4, backend=backend), parameter(7, backend=backend)]
    captured, eager = (
        FusedLayca(each, torch.tensor(0.1), base="adam", backend=backend, capturable=True, joins_at=1.0)
        for each in (params, clones(params))
    )
    rows = steady_gradients(params, 8)
    for optimizer in (captured, eager):
        train(optimizer, rows[:1])
    for _ in compare_replays(captured, eager, rows[1:], capturing):
        pass
    assert float(eager.state[eager.param_groups[0]["params"][0]]["radius"]) > 0


@native_backends
def test_stepping_in_backward_gives_the_bits_of_ordinary_steps(backend: str, seed: int) -> None:
    plain, model = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(2))
    nn.init.zeros_(plain.get_parameter("2.weight"))
    model.load_state_dict(plain.state_dict())
    optimizers = [
        FusedLayca(each.parameters(), 0.1, backend=backend, rotate=True, joins_at=0.2) for each in (plain, model)
    ]
    optimizers[1].step_in_backward()
    for inputs in torch.randn(6, 16, 6).unbind():
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            (each(inputs) - 1).square().mean().backward()
            optimizer.step()
    assert same_bits(dict(model.state_dict()), dict(plain.state_dict()))
    last = optimizers[0].state[plain.get_parameter("2.weight")]["radius"]
    assert float(last) > 0


@pytest.mark.parametrize("make", [lambda params: SGD(params, 0.1, momentum=0.9), lambda params: Adam(params, 0.05)])
@native_backends
def test_attach_leaves_a_layer_that_waits_the_steps_of_the_optimizer(
    backend: str, make: Callable[[list[Any]], torch.optim.Optimizer], seed: int
) -> None:
    """Its steps are read from the weights, with the rate in them: to rounding they are its own."""
    param, alone = zeros(6, 4, backend=backend), zeros(6, 4, backend=backend)
    optimizer, theirs = make([{"params": [param]}]), make([{"params": [alone]}])
    attach(optimizer, joins_at=1.0, backend=backend)
    rows = iter(steady_gradients([param], 60))
    while norm_of(param) < 1.0:
        row = next(rows)
        train(optimizer, [row])
        train(theirs, [row])
        assert relative_distance(param, alone) < 1e-6
        assert optimizer.state[param]["radius"].tolist() == [-1.0]
    norm = norm_of(param)
    before = param.detach().clone()
    train(optimizer, [next(rows)])
    assert norm_of(param) == pytest.approx(norm, rel=1e-6)
    angle = angle_between(before.double().flatten(), param.detach().double().flatten())
    assert angle == pytest.approx(math.atan(optimizer.param_groups[0]["lr"]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"joins_at": -1.0}, ValueError, r"joins_at=-1\.0: must be finite"),
        ({"joins_at": math.nan}, ValueError, "joins_at=nan: must be finite"),
        ({"joins_at": "later"}, TypeError, "joins_at='later': must be the norm"),
        ({"joins_at": True}, TypeError, "joins_at=True: must be the norm"),
        ({"joins_at": 1.0, "radius": 2.0}, ValueError, r"radius=2\.0 with joins_at=1\.0.*radius='initial'"),
    ],
    ids=str,
)
def test_norms_that_are_none_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedLayca([parameter(3, 3)], 0.1, **options)


def test_a_function_that_gives_no_norm_is_named_before_anything_changes(seed: int) -> None:
    param = zeros(4, 3)
    optimizer = FusedLayca([("branch", param)], 0.1, joins_at=lambda shape: 0.0)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"joins_at: the function gave 0\.0 .*\(4, 3\) of parameter 'branch'"):
        optimizer.step()
    assert not optimizer.state
