"""States, groups and checkpoints that are no such thing: errors that name what is wrong and the way out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from layca_fast import FusedLayca, attach

from ..support import contents, params_of, random_gradients, running, same_bits, train


def gradients(optimizer: Optimizer) -> None:
    for param in params_of(optimizer):
        param.grad = torch.randn_like(param)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_plain_dict_will_do_as_state(backend: str, seed: int) -> None:
    """torch makes a defaultdict; whoever clears the state by a new dict goes on as after its start."""
    optimizer, plain = running(backend), running(backend)
    for param, other in zip(params_of(optimizer), params_of(plain), strict=True):
        other.data.copy_(param)
    optimizer.state.clear()
    plain.state = {}
    rows = random_gradients(params_of(optimizer), 2)
    train(optimizer, rows)
    train(plain, rows)
    assert same_bits(contents(plain), contents(optimizer))


@pytest.mark.parametrize("value", [None, 3, "momentum", [1.0]], ids=repr)
@pytest.mark.parametrize("inside", [False, True], ids=["step", "in backward"])
def test_a_state_that_is_no_dict_is_refused_by_name(value: Any, inside: bool, seed: int) -> None:
    optimizer = running("cpu")
    optimizer.zero_grad()
    (matrix, bias) = params_of(optimizer)
    optimizer.state[bias] = value
    before = [param.detach().clone() for param in (matrix, bias)]
    wrong = pytest.raises(TypeError, match=r"the state of parameter 'bias'.*must be a dict.*del optimizer\.state")
    if inside:
        with optimizer.step_in_backward(), wrong:
            (matrix.sum() + bias.sum()).backward()
    else:
        gradients(optimizer)
        with wrong:
            optimizer.step()
    assert same_bits([param.detach() for param in (matrix, bias)], before)


def test_a_state_that_is_no_dict_is_refused_under_attach(seed: int) -> None:
    optimizer = SGD([("matrix", Parameter(torch.randn(4, 3)))], lr=0.1)
    attach(optimizer)
    gradients(optimizer)
    optimizer.state[params_of(optimizer)[0]] = None  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"the state of parameter 'matrix'"):
        optimizer.step()


@pytest.mark.parametrize("lacking", ["lr", "base", "rule", "rotate", "chunks", "momentum", "weight_decay", "backend"])
def test_a_group_appended_by_hand_is_refused(lacking: str, seed: int) -> None:
    optimizer = running("cpu")
    group = {name: value for name, value in optimizer.param_groups[0].items() if name not in (lacking, "param_names")}
    optimizer.param_groups.append({**group, "params": [Parameter(torch.randn(2, 2))]})
    gradients(optimizer)
    before = [param.detach().clone() for param in params_of(optimizer)]
    for call in (optimizer.step, optimizer.sync_hyperparameters):
        with pytest.raises(ValueError, match=rf"{lacking}.*add_param_group|{lacking}.*set them in the group"):
            call()
    assert same_bits([param.detach() for param in params_of(optimizer)], before)


def test_a_group_without_parameters_is_refused(seed: int) -> None:
    optimizer = running("cpu")
    with pytest.raises(ValueError, match=r"no 'params', only \['lr'\]"):
        optimizer.add_param_group({"lr": 0.1})
    group = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    optimizer.param_groups.append(group)
    with pytest.raises(ValueError, match=r"group 1 of the optimizer lacks 'params'"):
        optimizer.step()


def attached() -> Optimizer:
    optimizer = SGD([("matrix", Parameter(torch.randn(4, 3))), ("bias", Parameter(torch.randn(5)))], lr=0.1)
    attach(optimizer)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    return optimizer


GOOD = {"state": {}, "param_groups": [{"params": [0, 1], "lr": 0.1}]}

CHECKPOINTS: dict[str, tuple[Any, str]] = {
    "None": (None, r"state_dict is a NoneType: pass what optimizer\.state_dict\(\) returned"),
    "a list": ([GOOD], r"state_dict is a list"),
    "nothing": ({}, r"state_dict has no 'state', only \[\]"),
    "a whole checkpoint": (
        {"model": {}, "optimizer": GOOD},
        r"has no 'state', only \['model', 'optimizer'\].*part for",
    ),
    "no groups": ({"state": {}}, r"has no 'param_groups'"),
    "a list of states": ({**GOOD, "state": [{}]}, r"'state' is a list: it must be a dict"),
    "groups in a dict": ({**GOOD, "param_groups": {}}, r"'param_groups' is a dict: it must be a list"),
    "a group that is none": ({**GOOD, "param_groups": [None]}, r"group 0 is no dict with the key 'params'"),
    "a group without parameters": (
        {**GOOD, "param_groups": [{"lr": 0.1}]},
        r"group 0 is no dict with the key 'params'",
    ),
    "a state that is none": (
        {**GOOD, "state": {0: None}},
        r"the state of parameter 0 is a NoneType: it must be a dict",
    ),
}


@pytest.mark.parametrize("make", [lambda: running("cpu"), attached], ids=["FusedLayca", "attach"])
@pytest.mark.parametrize(("saved", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused(saved: Any, message: str, make: Callable[[], Optimizer], seed: int) -> None:
    optimizer = make()
    before = contents(optimizer)
    if isinstance(optimizer, FusedLayca) or isinstance(saved, dict):
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.load_state_dict(saved)
    assert same_bits(contents(optimizer), before)
