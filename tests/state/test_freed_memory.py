"""State whose memory was freed, expanded, or made in inference mode: an error by name, or a step, and never a crash."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca, attach

from ..support import clones, contents, every_backend, native_backends, params_of, random_gradients, same_bits, train

#: Bases with every kind of state that the kernels are handed.
KINDS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "momentum_buffer": ({"momentum": 0.9}, torch.float32),
    "exp_avg": ({"base": "adam"}, torch.float32),
    "exp_avg_sq": ({"base": "adam"}, torch.float32),
    "max_exp_avg_sq": ({"base": "adam", "amsgrad": True}, torch.float32),
    "square_avg": ({"base": "rmsprop"}, torch.float32),
    "sum": ({"base": "adagrad"}, torch.float32),
    "step": ({"base": "adam"}, torch.float32),
    "radius": ({}, torch.float32),
    "remainder": ({}, torch.bfloat16),
}

every_state = pytest.mark.parametrize("name", KINDS)


def running(name: str, backend: str) -> FusedLayca:
    options, dtype = KINDS[name]
    params = [(label, Parameter(torch.randn(6, 4).to(dtype))) for label in ("first", "second")]
    optimizer = FusedLayca(params, 0.1, backend=backend, **options)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    return optimizer


def to_nothing(state: Tensor) -> None:
    state.untyped_storage().resize_(0)


@every_state
@every_backend
def test_a_state_without_memory_is_refused_by_name(backend: str, name: str, seed: int) -> None:
    optimizer = running(name, backend)
    params = params_of(optimizer)
    state = optimizer.state[params[1]][name]
    for param in params:
        param.grad = torch.randn_like(param)
    to_nothing(state)
    before = [param.detach().clone() for param in params]
    first = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"the memory of the state '{name}' of parameter 'second'.*was freed"):
            optimizer.step()
    assert same_bits([param.detach() for param in params], before)
    assert same_bits(dict(optimizer.state[params[0]]), first)
    del optimizer.state[params[1]]
    optimizer.step()


@every_state
def test_a_state_of_which_a_part_is_left_is_refused_by_name(name: str, seed: int) -> None:
    optimizer = running(name, "cpu")
    params = params_of(optimizer)
    short = torch.empty_like(optimizer.state[params[1]][name])
    short.untyped_storage().resize_(short.nbytes // 2)
    optimizer.state[params[1]][name] = short
    for param in params:
        param.grad = torch.randn_like(param)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=rf"the memory of the state '{name}' of parameter 'second'"):
        optimizer.step()
    assert same_bits([param.detach() for param in params], before)


@every_state
def test_a_checkpoint_without_memory_is_refused_by_name(name: str, seed: int) -> None:
    optimizer = running(name, "cpu")
    saved = optimizer.state_dict()
    loaded = running(name, "cpu")
    saved["state"][1][name].untyped_storage().resize_(0)
    before = contents(loaded)
    with pytest.raises(ValueError, match=rf"the memory of state_dict: the state '{name}' of parameter 'second'"):
        loaded.load_state_dict(saved)
    assert same_bits(contents(loaded), before)


def test_a_freed_state_is_refused_inside_of_backward(seed: int) -> None:
    optimizer = running("momentum_buffer", "cpu")
    (first, second) = params_of(optimizer)
    optimizer.zero_grad()
    with optimizer.step_in_backward():
        (first * second).sum().backward()
        optimizer.step()
        optimizer.state[second]["momentum_buffer"].untyped_storage().resize_(0)
        before = second.detach().clone()
        with pytest.raises(ValueError, match=r"momentum_buffer.*'second'.*was freed"):
            (first * second).sum().backward()
        assert torch.equal(second, before)


def test_a_freed_radius_is_refused_under_attach(seed: int) -> None:
    params = [("first", Parameter(torch.randn(6, 4))), ("second", Parameter(torch.randn(6, 4)))]
    optimizer = torch.optim.SGD(params, lr=0.1)
    attach(optimizer)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    optimizer.state[params[1][1]]["radius"].untyped_storage().resize_(0)
    before = [param.detach().clone() for param in params_of(optimizer)]
    for param in params_of(optimizer):
        param.grad = torch.randn_like(param)
    with pytest.raises(ValueError, match=r"'radius' of parameter 'second'.*was freed"):
        optimizer.step()
    assert same_bits([param.detach() for param in params_of(optimizer)], before)


def test_what_reports_of_state_is_refused_without_memory(seed: int) -> None:
    optimizer = running("radius", "cpu")
    to_nothing(optimizer.state[params_of(optimizer)[1]]["radius"])
    with pytest.raises(ValueError, match=r"'radius' of parameter 'second'.*was freed"):
        optimizer.rotation_stats()
    optimizer = running("remainder", "cpu")
    param = params_of(optimizer)[1]
    to_nothing(optimizer.state[param]["remainder"])
    with pytest.raises(ValueError, match=r"'remainder'.*was freed"):
        optimizer.effective_weight(param)
    to_nothing(param)
    with pytest.raises(ValueError, match=r"the parameter.*was freed"):
        optimizer.effective_weight(param)


@pytest.mark.parametrize("of", ["lr", "weights"])
@native_backends
def test_what_else_a_step_reads_is_refused_without_memory(backend: str, of: str, seed: int) -> None:
    lr = torch.tensor(0.1)
    optimizer = FusedLayca([("matrix", Parameter(torch.randn(6, 4)))], lr, momentum=0.9, backend=backend)
    (param,) = params_of(optimizer)
    train(optimizer, random_gradients([param], 2))
    (lr if of == "lr" else param).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="freed"):
        optimizer.step()


def columns() -> Parameter:
    return Parameter(torch.randn(6, 9)[:, :4])


@pytest.mark.parametrize("make", [columns, lambda: Parameter(torch.randn(6, 4))], ids=["not dense", "dense"])
@native_backends
def test_an_expanded_state_steps_as_its_copy_does(backend: str, make: Callable[[], Parameter], seed: int) -> None:
    """It cannot be written element by element: the first tensor had moved when torch found that."""
    backend = "torch" if make is columns else backend
    params = [make(), make()]
    copies = clones(params)
    rows = random_gradients(params, 2)
    first = torch.randn(6, 1)
    for some, state in ((params, first.expand(6, 4)), (copies, first.expand(6, 4).clone())):
        optimizer = FusedLayca(some, 0.1, momentum=0.9, backend=backend)
        train(optimizer, rows[:1])
        optimizer.state[some[1]]["momentum_buffer"] = state
        train(optimizer, rows[1:])
    assert same_bits([each.detach().contiguous() for each in params], [each.detach().contiguous() for each in copies])
    assert first.shape == (6, 1)


@every_backend
def test_an_inference_parameter_is_refused_before_anything_moves(backend: str, seed: int) -> None:
    first = Parameter(torch.randn(6, 4))
    with torch.inference_mode():
        second = Parameter(torch.randn(6, 4))
    with pytest.raises(ValueError, match=r"'second'.*inference.*clone\(\)"):
        FusedLayca([("first", first), ("second", second)], 0.1, backend=backend)
    with torch.inference_mode():
        optimizer = FusedLayca([("first", first), ("second", second)], 0.1, backend=backend)
    for param in (first, second):
        with torch.inference_mode(mode=param is second):
            param.grad = torch.randn(6, 4)
    before = first.detach().clone()
    with pytest.raises(ValueError, match=r"'second'.*inference"):
        optimizer.step()
    assert torch.equal(first, before)


@pytest.mark.parametrize("options", [{"base": "adam"}, {"base": "muon"}, {"base": "sgd", "radius": "learned"}], ids=str)
@every_backend
def test_state_of_inference_mode_goes_on_outside_of_it(options: dict[str, Any], backend: str, seed: int) -> None:
    """A checkpoint that was loaded there, or a first step that was taken there."""
    weights = [torch.randn(6, 4), torch.randn(5, 3)]
    rows = random_gradients(weights, 4)
    ends = []
    for where in ("nowhere", "load", "step"):
        params = clones(weights)
        optimizer = FusedLayca(params, 0.1, **options, backend=backend)
        with torch.inference_mode(mode=where == "step"):
            train(optimizer, rows[:2])
        with torch.inference_mode(mode=where == "load"):
            optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, rows[2:])
        ends.append([param.detach() for param in params])
    assert same_bits(ends[1], ends[0])
    assert same_bits(ends[2], ends[0])


@native_backends
def test_unscaling_that_began_in_inference_mode_goes_on_outside_of_it(backend: str, seed: int) -> None:
    weights = [torch.randn(6, 4)]
    rows = random_gradients(weights, 4)
    ends = []
    for inside in (False, True):
        (param,) = clones(weights)
        optimizer = FusedLayca([param], 0.1, momentum=0.9, unscale_in_step=True, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step, (grad,) in enumerate(rows):
            optimizer.zero_grad()
            scaler.scale((param * grad).sum()).backward()
            with torch.inference_mode(mode=inside and step % 2 == 0):
                scaler.step(optimizer)
            scaler.update()
        ends.append([param.detach()])
    assert same_bits(*ends)


def test_an_attached_step_of_inference_mode_goes_on_outside_of_it(seed: int) -> None:
    weights = [torch.randn(6, 4), torch.randn(5)]
    rows = random_gradients(weights, 4)
    ends = []
    for inside in (False, True):
        params = clones(weights)
        optimizer = torch.optim.SGD(params, 0.1)
        attach(optimizer)
        with torch.inference_mode(mode=inside):
            train(optimizer, rows[:2])
        train(optimizer, rows[2:])
        ends.append([param.detach() for param in params])
    assert same_bits(*ends)
