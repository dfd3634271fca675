"""Numbers of numpy, Fraction and Decimal as hyperparameters: kept as Python's own, as checkpoints need them."""

import copy
import io
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from layca_fast import FusedLayca, RotationMonitor, attach, layer_groups

from ..support import clones, contents, parameter, params_of, random_gradients, same_bits, train

KINDS: dict[str, Callable[[float], Any]] = {
    "numpy float64": numpy.float64,
    "numpy float32": numpy.float32,
    "numpy float16": numpy.float16,
    "0-d array": numpy.array,
    "Fraction": Fraction,
    "Decimal": Decimal,
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())

#: Options of all kinds, of numbers that every one of the kinds holds exactly.
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.125, "momentum": 0.5, "dampening": 0.25, "weight_decay": 0.0},
    "rmsprop": {"base": "rmsprop", "lr": 0.125, "alpha": 0.75, "eps": 0.5, "momentum": 0.25},
    "adam": {"base": "adam", "lr": 0.125, "betas": (0.5, 0.75), "eps": 0.5},
    "lion": {"base": "lion", "lr": 0.125, "betas": (0.5, 0.75)},
}
every_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def of_kind(kind: Callable[[float], Any], options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str) else tuple(map(kind, value)) if name == "betas" else kind(value)
        for name, value in options.items()
    }


def reloaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


MADE: dict[str, Callable[[list[nn.Parameter], dict[str, Any]], FusedLayca]] = {
    "constructor": lambda params, options: FusedLayca(params, **options),
    "group": lambda params, options: FusedLayca([{"params": params, **options}]),
}


def added(params: list[nn.Parameter], options: dict[str, Any]) -> FusedLayca:
    optimizer = FusedLayca([{"params": []}])
    optimizer.add_param_group({"params": params, **options})
    return optimizer


def assigned(params: list[nn.Parameter], options: dict[str, Any]) -> FusedLayca:
    """As a scheduler does it: found at the next step."""
    plain = {name: options[name] for name in ("base",) if name in options}
    optimizer = FusedLayca(params, 0.1, **plain)
    optimizer.param_groups[0].update(options)
    return optimizer


MADE |= {"add_param_group": added, "assigned": assigned}


@every_kind
@every_options
@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_they_are_kept_as_pythons_own(make: Any, options: dict[str, Any], kind: Any, seed: int) -> None:
    params = [parameter(4, 3), parameter(5)]
    twins = clones(params)
    plain, optimizer = make(params, options), make(twins, of_kind(kind, options))
    assert reloaded(optimizer.state_dict())["param_groups"] == plain.state_dict()["param_groups"]
    grads = random_gradients(params, 2)
    for each in (plain, optimizer):
        train(each, grads)
    assert same_bits(contents(optimizer), contents(plain))
    assert optimizer.param_groups[-1]["lr"] == 0.125
    assert type(optimizer.param_groups[-1]["lr"]) is float
    resumed = copy.deepcopy(plain)
    resumed.load_state_dict(reloaded(optimizer.state_dict()))
    assert same_bits(resumed.state_dict(), plain.state_dict())


@every_kind
def test_checkpoints_that_hold_them_already_can_be_loaded(kind: Any, seed: int) -> None:
    optimizer = FusedLayca([parameter(4, 3)], 0.125, momentum=0.5)
    train(optimizer, random_gradients(params_of(optimizer), 1))
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(lr=kind(0.25), momentum=kind(0.75))
    optimizer.load_state_dict(saved)
    group = reloaded(optimizer.state_dict())["param_groups"][0]
    assert (group["lr"], group["momentum"]) == (0.25, 0.75)
    train(optimizer, random_gradients(params_of(optimizer), 1))


def test_a_schedule_of_numpys_functions(seed: int) -> None:
    optimizer = FusedLayca([parameter(4, 3)], 0.1, momentum=0.9)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: numpy.cos(numpy.float64(step) / 10))
    for grads in random_gradients(params_of(optimizer), 3):
        train(optimizer, [grads])
        scheduler.step()
        saved = reloaded(optimizer.state_dict())
        assert type(saved["param_groups"][0]["lr"]) is float
    assert saved["param_groups"][0]["lr"] == pytest.approx(0.1 * numpy.cos(0.3))


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "truths": ({"amsgrad": numpy.True_, "maximize": numpy.False_}, {"amsgrad": True, "maximize": False}),
    "whole numbers": ({"chunks": numpy.int64(2)}, {"chunks": 2}),
    "a truth of rotate": ({"rotate": numpy.True_}, {"rotate": True}),
    "text": ({"rule": numpy.str_("hyperball")}, {"rule": "hyperball"}),
    "betas as an array": ({"betas": numpy.array([0.5, 0.75])}, {"betas": (0.5, 0.75)}),
    "betas as a list": ({"betas": [numpy.float32(0.5), 0.75]}, {"betas": [0.5, 0.75]}),
    "a key of the user's own": ({"lr_scale": numpy.float32(0.5)}, {"lr_scale": 0.5}),
    "keys of schedulers": (
        {"max_lr": numpy.float64(0.5), "initial_lr": Fraction(1, 2)},
        {"max_lr": 0.5, "initial_lr": 0.5},
    ),
}


@pytest.mark.parametrize(("given", "kept"), OTHERS.values(), ids=OTHERS.keys())
def test_options_that_are_no_fractions(given: dict[str, Any], kept: dict[str, Any], seed: int) -> None:
    optimizer = FusedLayca([{"params": [parameter(4, 3)], "base": "adam", **given}], 0.1)
    group = reloaded(optimizer.state_dict())["param_groups"][0]
    found = {name: group[name] for name in kept}
    assert found == kept
    assert [type(each) for each in found.values()] == [type(each) for each in kept.values()]
    train(optimizer, random_gradients(params_of(optimizer), 2))


@every_kind
def test_layer_groups_hold_none_of_them(kind: Any, seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    arguments = {"lr": 0.125, "alpha": 0.5, "others_lr": 0.25, "weight_decay": 0.5, "momentum": 0.5}
    groups = layer_groups(model, **{name: kind(value) for name, value in arguments.items()})
    optimizer = torch.optim.SGD(groups, lr=0.1)
    attach(optimizer)
    reloaded(optimizer.state_dict())
    expected = layer_groups(model, **arguments)
    assert [group["lr"] for group in groups] == [group["lr"] for group in expected]


@every_kind
def test_attach_turns_by_them(kind: Any, seed: int) -> None:
    params = [parameter(4, 3)]
    twins = clones(params)
    optimizers = torch.optim.SGD(params, lr=0.125), torch.optim.SGD(twins, lr=0.125)
    for optimizer in optimizers:
        attach(optimizer)
    if kind in (numpy.float64, numpy.float32, numpy.float16):
        # torch's own step takes no others.
        optimizers[1].param_groups[0]["lr"] = kind(0.125)
    grads = random_gradients(params, 2)
    for optimizer in optimizers:
        train(optimizer, grads)
    assert same_bits(contents(optimizers[1]), contents(optimizers[0]))


def test_a_monitors_whole_numbers(seed: int) -> None:
    model = nn.Linear(3, 4)
    monitor = RotationMonitor(
        model, every=numpy.int64(2), keep="sketch", sketch_size=numpy.int32(5), seed=numpy.int64(3)
    )
    assert monitor.record(numpy.int64(2))
    saved = reloaded(monitor.state_dict())
    resumed = RotationMonitor(model, every=2, keep="sketch", sketch_size=5, seed=3)
    resumed.load_state_dict(saved)
    assert resumed.curves.steps == [0, 2]


@pytest.mark.parametrize(
    "wrong", [numpy.array([0.1, 0.2]), numpy.float64("nan"), Decimal("-0.5"), Decimal("Infinity")], ids=repr
)
def test_what_is_out_of_range_is_refused_as_ever(wrong: Any, seed: int) -> None:
    optimizer = FusedLayca([parameter(4, 3)], 0.1)
    with pytest.raises((TypeError, ValueError), match="lr="):
        FusedLayca([parameter(4, 3)], wrong)
    optimizer.param_groups[0]["lr"] = wrong
    with pytest.raises((TypeError, ValueError), match="lr="):
        train(optimizer, random_gradients(params_of(optimizer), 1))
