"""radius as a number, or as a function of a layer's shape: the first moving step leads there, and the next stay."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from layca_fast import FusedLayca, attach, layer_groups
from layca_fast.commands.verify import angle_between, angle_tolerance, layers_of
from layca_fast.reference import reference_step

from ..support import (
    clones,
    contents,
    every_backend,
    native_backends,
    norm_of,
    parameter,
    random_gradients,
    relative_distance,
    same_bits,
    train,
)
from .capture_support import compare_replays


def spectral(shape: torch.Size) -> float:
    rows, columns = shape
    return math.sqrt(rows / columns)


def off_by(offset: float) -> Callable[[torch.Size], float]:
    return lambda shape: spectral(shape) + offset


@pytest.mark.parametrize("rule", ["layca", "hyperball"])
@pytest.mark.parametrize(
    ("radius", "chunks"),
    [(3.5, 1), (spectral, 1), (2.5, 2), (spectral, "all")],
    ids=["3.5", "f", "2.5 of 2", "f of all"],
)
@every_backend
def test_the_first_moving_step_leads_to_the_radius_at_the_asked_angle(
    backend: str, radius: Any, chunks: Any, rule: str, seed: int
) -> None:
    """And steps follow the specification; before, a step at lr = 0 has moved nothing."""
    param = parameter(6, 4, backend=backend)
    options = {"radius": radius, "chunks": chunks, "rule": rule, "momentum": 0.9}
    optimizer = FusedLayca([param], 0.0, backend=backend, **options)
    start = param.detach().clone()
    train(optimizer, random_gradients([param], 1))
    assert same_bits(param.detach(), start)
    weight, state = start.double().cpu(), {"momentum_buffer": optimizer.state[param]["momentum_buffer"].double().cpu()}
    optimizer.param_groups[0]["lr"] = 0.1
    layers = {1: (6, 4), 2: (3, 4), "all": (1, 4)}[chunks]
    expected = radius if isinstance(radius, float) else spectral(torch.Size(layers))
    for (grad,) in random_gradients([param], 3):
        before = param.detach().clone()
        train(optimizer, [[grad]])
        reference_step(weight, grad.double().cpu(), state, lr=0.1, **options)
        assert relative_distance(param, weight) < 1e-6
        assert [norm_of(each) for each in layers_of(param, chunks)] == pytest.approx(
            [expected] * (6 * 4 // math.prod(layers)), rel=1e-6
        )
        if rule == "layca":
            for old, new in zip(layers_of(before, chunks), layers_of(param.detach(), chunks), strict=True):
                angle = angle_between(old.double().flatten(), new.double().flatten())
                assert angle == pytest.approx(math.atan(0.1), rel=angle_tolerance(torch.float32, 0.1, old.numel()))
    assert optimizer.state[param]["radius"].tolist() == pytest.approx([expected] * (24 // math.prod(layers)), rel=1e-15)


@pytest.mark.parametrize(
    ("shape", "chunks", "seen"),
    [
        ((6, 4), 1, (6, 4)),
        ((6, 4), 3, (2, 4)),
        ((6, 4), "all", (1, 4)),
        ((6, 4, 3, 2), 1, (6, 24)),
        ((6, 4, 3, 2), 2, (3, 24)),
        ((6, 4, 3), "all", (4, 3)),
        ((6,), 1, (6, 1)),
        ((6,), 2, (3, 1)),
        ((), 1, (1, 1)),
    ],
    ids=str,
)
def test_a_function_sees_the_shape_of_a_layer_as_rows_and_all_else(
    shape: tuple[int, ...], chunks: Any, seen: tuple[int, int], seed: int
) -> None:
    shapes = []

    def looking(shape: torch.Size) -> float:
        shapes.append(shape)
        return 1.0

    param = parameter(*shape)
    optimizer = FusedLayca([param], 0.1, rotate=True, chunks=chunks, radius=looking)
    train(optimizer, random_gradients([param], 2))
    assert shapes == [torch.Size(seen)]


@pytest.mark.parametrize(
    "made", [0, -1.0, math.nan, math.inf, "wide", None, True, torch.ones(2), 1e300, 1e-300], ids=str
)
@native_backends
def test_what_is_no_norm_is_refused_before_anything_changes(backend: str, made: Any, seed: int) -> None:
    params = [("first", parameter(3, 3, backend=backend)), ("weight", parameter(6, 4, backend=backend))]
    optimizer = FusedLayca(
        params, 0.1, momentum=0.9, backend=backend, radius=lambda shape: made if shape == (6, 4) else 1.0
    )
    for _, param in params:
        param.grad = torch.randn_like(param)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"(?s)radius.*\(6, 4\) of parameter 'weight'"):
        optimizer.step()
    assert same_bits(contents(optimizer), before)


def test_what_a_function_raises_is_told_with_the_layer(seed: int) -> None:
    param = parameter(6, 4)
    optimizer = FusedLayca([("weight", param)], 0.1, radius=lambda shape: shape[2])
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"radius: the function failed .*\(6, 4\) of parameter 'weight'.*IndexError"):
        optimizer.step()


@pytest.mark.parametrize("radius", [0, -2.0, math.inf, math.nan, True, None, "spectral", [1.0]], ids=str)
def test_a_radius_that_is_none_is_refused(radius: Any) -> None:
    with pytest.raises(ValueError, match=r"radius=.*(must be finite|is unknown)"):
        FusedLayca([parameter(3, 3)], 0.1, radius=radius)


def test_numbers_of_others_are_plain_in_checkpoints(seed: int) -> None:
    numbers: list[Any] = [numpy.float32(2.5), numpy.array(2.5), Fraction(5, 2), 2.5]
    for number in numbers:
        param = parameter(4, 3)
        optimizer = FusedLayca([param], 0.1, radius=number)
        train(optimizer, random_gradients([param], 1))
        assert norm_of(param) == pytest.approx(2.5, rel=1e-6)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        assert torch.load(file, weights_only=True)["param_groups"][0]["radius"] == 2.5


@native_backends
def test_a_new_number_counts_after_reset_radius(backend: str, seed: int) -> None:
    param = parameter(5, 4, backend=backend)
    optimizer = FusedLayca([param], 0.1, backend=backend, radius=2.0)
    group = optimizer.param_groups[0]
    for radius, reset, expected in (
        (3.0, False, 2.0),
        (3.0, True, 3.0),
        ("initial", True, 3.0),
        (spectral, False, 3.0),
    ):
        train(optimizer, random_gradients([param], 1))
        group["radius"] = radius
        if reset:
            optimizer.reset_radius()
        train(optimizer, random_gradients([param], 1))
        assert norm_of(param) == pytest.approx(expected, rel=1e-6)


@native_backends
def test_a_number_set_before_the_first_moving_step_is_the_radius(backend: str, seed: int) -> None:
    """The state is there since a step at lr = 0, and says nothing yet; and a number taken back leaves no trace."""
    param, other = parameter(5, 4, backend=backend), parameter(3, 4, backend=backend)
    groups = [{"params": [param]}, {"params": [other], "radius": 9.0}]
    optimizer = FusedLayca(groups, 0.0, backend=backend)
    train(optimizer, random_gradients([param, other], 1))
    norm = norm_of(other)
    optimizer.param_groups[0].update(radius=2.0, lr=0.1)
    optimizer.param_groups[1].update(radius="initial", lr=0.1)
    train(optimizer, random_gradients([param, other], 2))
    assert [norm_of(param), norm_of(other)] == pytest.approx([2.0, norm], rel=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("radius", [2.5, spectral], ids=["number", "function"])
@native_backends
def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(backend: str, radius: Any, steps: int, seed: int) -> None:
    """Saved before its first step, after one at lr = 0, and later; the function stays that of the new optimizer."""
    params = [parameter(6, 5, backend=backend), parameter(4, 3, 2, backend=backend)]
    rows = random_gradients(params, 6)
    optimizer = FusedLayca(params, 0.0 if steps == 1 else 0.1, base="adam", backend=backend, radius=radius)
    train(optimizer, rows[:steps])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = FusedLayca(clones(params), 0.2, base="adam", backend=backend, radius=radius if callable(radius) else 7.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for each in (optimizer, resumed):
        each.param_groups[0]["lr"] = 0.1
        train(each, rows[3:])
    assert same_bits(contents(resumed), contents(optimizer))
    assert resumed.param_groups[0]["radius"] == radius


def test_a_function_that_is_not_here_is_asked_for(seed: int) -> None:
    saved = FusedLayca([("weight", parameter(4, 3))], 0.1, radius=spectral).state_dict()
    loaded = FusedLayca([("weight", parameter(4, 3))], 0.1)
    before = dict(loaded.param_groups[0])
    with pytest.raises(ValueError, match=r"radius of group 0 was a function.*\['radius'\] = 'initial'"):
        loaded.load_state_dict(saved)
    assert dict(loaded.param_groups[0]) == before
    saved["param_groups"][0]["radius"] = "initial"
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["radius"] == "initial"


def test_copies_and_pickles_keep_the_function(seed: int) -> None:
    optimizer = FusedLayca([parameter(6, 4)], 0.1, radius=spectral)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (param,) = twin.param_groups[0]["params"]
        train(twin, random_gradients([param], 1))
        assert norm_of(param) == pytest.approx(math.sqrt(6 / 4), rel=1e-6)


@every_backend
def test_captured_steps_replay_as_eager_ones(backend: str, capturing: Callable[[bool], None], seed: int) -> None:
    params = [parameter(5, 4, backend=backend), parameter(7, backend=backend)]
    captured, eager = (
        FusedLayca(each, torch.tensor(0.0), base="adam", backend=backend, capturable=True, radius=spectral)
        for each in (params, clones(params))
    )
    rows = random_gradients(params, 5)
    for optimizer in (captured, eager):
        train(optimizer, rows[:1])
        optimizer.param_groups[0]["lr"].fill_(0.1)
    for _ in compare_replays(captured, eager, rows[1:], capturing):
        pass
    assert norm_of(params[0]) == pytest.approx(math.sqrt(5 / 4), rel=1e-6)


def test_layer_groups_hand_a_function_to_every_layer(seed: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Conv2d(2, 4, 3))
    optimizer = FusedLayca(layer_groups(model, radius=spectral), 0.1)
    train(optimizer, random_gradients([each for group in optimizer.param_groups for each in group["params"]], 2))
    assert norm_of(model.get_parameter("0.weight")) == pytest.approx(math.sqrt(8 / 6), rel=1e-6)
    assert norm_of(model.get_parameter("1.weight")) == pytest.approx(math.sqrt(4 / 18), rel=1e-6)


@pytest.mark.parametrize("make", [lambda params: SGD(params, 0.1, momentum=0.9), lambda params: Adam(params, 0.1)])
@native_backends
def test_attach_leads_to_a_given_radius_too_and_resumes(
    backend: str, make: Callable[[list[Any]], torch.optim.Optimizer], seed: int
) -> None:
    param = parameter(6, 4, backend=backend)
    optimizer = make([{"params": [param], "radius": spectral}])
    attach(optimizer, radius=5.0, backend=backend)
    rows = random_gradients([param], 4)
    train(optimizer, rows[:2])
    assert norm_of(param) == pytest.approx(math.sqrt(6 / 4), rel=1e-6)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    (twin,) = clones([param])
    resumed = make([{"params": [twin], "radius": off_by(0.0)}])
    attach(resumed, backend=backend)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for each in (optimizer, resumed):
        train(each, rows[2:])
    assert same_bits(param.detach(), twin.detach())
