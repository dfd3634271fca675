"""What users do to parameters and state while a run goes on, and what must follow from it."""

import collections
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.commands.verify import angle_between

from ..support import (
    assert_close,
    clones,
    contents,
    copy_of,
    every_backend,
    native_backends,
    norm_of,
    parameter,
    params_of,
    random_gradients,
    relative_distance,
    same_bits,
    train,
)


@every_backend
def test_reset_radius_takes_the_norms_after_surgery_and_nothing_else(backend: str, seed: int) -> None:
    params = [parameter(4, 3, backend=backend, dtype=torch.float64), parameter(5, backend=backend, dtype=torch.float64)]
    optimizer = FusedLayca(params, 0.1, momentum=0.9, backend=backend)
    train(optimizer, random_gradients(params, 2))
    initial = norm_of(params[0])
    params[0].data.mul_(2.5)
    buffers = copy_of([optimizer.state[param]["momentum_buffer"] for param in params])
    optimizer.reset_radius()
    assert same_bits(copy_of([optimizer.state[param]["momentum_buffer"] for param in params]), buffers)
    train(optimizer, random_gradients(params, 2))
    assert norm_of(params[0]) == pytest.approx(2.5 * initial, rel=1e-13)
    assert float(optimizer.state[params[0]]["radius"]) == pytest.approx(2.5 * initial, rel=1e-14)


@every_backend
def test_parameters_without_a_gradient_stay_as_they_are_and_may_come_and_go(backend: str, seed: int) -> None:
    """Bit for bit, state included; each trains exactly as if it had been alone with the steps it had gradients in."""
    params = [parameter(*shape, backend=backend) for shape in ((5, 4), (3, 2, 2), (6,), (4, 4))]
    twins = clones(params)
    together = FusedLayca(params, 0.1, momentum=0.9, dampening=0.3, backend=backend)
    options = {"momentum": 0.9, "dampening": 0.3, "backend": backend}
    alone = [FusedLayca([twin], 0.1, rotate=twin.dim() >= 2, **options) for twin in twins]
    present = ((1, 0, 1, 0), (0, 1, 1, 0), (1, 1, 0, 0), (0, 0, 0, 0), (1, 0, 1, 0), (1, 1, 1, 0))
    for row, grads in zip(present, random_gradients(params, len(present)), strict=True):
        given = [grad if here else None for grad, here in zip(grads, row, strict=True)]
        before = contents(together)
        train(together, [given])
        after = contents(together)
        for i, here in enumerate(row):
            assert same_bits(before[i][::2], after[i][::2]) != bool(here)
            if here:
                train(alone[i], [[given[i]]])
        assert same_bits([param.detach() for param in params], [twin.detach() for twin in twins])
    assert not together.state.get(params[3]), "a parameter that never had a gradient has no state"


@every_backend
def test_frozen_and_thawed(backend: str, seed: int) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(parameter(1, backend=backend).device)
    optimizer = FusedLayca(model.parameters(), 0.1, momentum=0.9, backend=backend)
    inputs = torch.randn(8, 4).to(model[0].weight.device)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    model[0].requires_grad_(False)
    frozen = copy_of(list(model[0].parameters()))
    step()
    step()
    assert same_bits(copy_of(list(model[0].parameters())), frozen)
    assert not optimizer.state.get(model[0].weight)
    model[0].requires_grad_(True)
    step()
    assert not same_bits(copy_of(list(model[0].parameters())), frozen)


@native_backends
def test_tied_weights_turn_once(backend: str, seed: int) -> None:
    first, second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second)
    optimizer = FusedLayca(model.parameters(), 0.2, momentum=0.9, backend=backend)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(7, 5)).square().mean().backward()
        before = first.weight.detach().double().flatten()
        optimizer.step()
        assert angle_between(before, first.weight.detach().double().flatten()) == pytest.approx(
            math.atan(0.2), rel=2e-6
        )
    assert second.weight is first.weight


@dataclass(frozen=True)
class Move:
    """Something done to a parameter in the middle of a run that leaves its values as they are."""

    name: str
    do: Callable[[Parameter], Any]
    shape: tuple[int, ...] = (6, 3, 4, 5)
    tolerance: float = 1e-6
    options: Mapping[str, Any] = field(default_factory=lambda: {"momentum": 0.9, "nesterov": True})


def set_data(make: Callable[[Tensor], Tensor]) -> Callable[[Parameter], None]:
    def do(param: Parameter) -> None:
        param.data = make(param.data)

    return do


def into_one_vector(param: Parameter) -> None:
    """What vector_to_parameters does: data becomes a view at an offset that no vector load likes."""
    vector = torch.cat([param.data.new_zeros(1), param.data.flatten()])
    param.data = vector[1:].view(param.shape)


MOVES = (
    Move("p.data replaced by a copy", set_data(torch.clone), tolerance=0.0),
    Move("p.data a misaligned view", into_one_vector, tolerance=0.0),
    Move("to channels_last", set_data(lambda data: data.contiguous(memory_format=torch.channels_last))),
    Move("to a transposed layout", set_data(lambda data: data.t().contiguous().t()), (7, 9)),
    Move(
        "to a transposed layout, in chunks",
        set_data(lambda data: data.t().contiguous().t()),
        (6, 9),
        options={"momentum": 0.9, "chunks": 3, "backend": "auto"},
    ),
    Move("to float64", set_data(Tensor.double), tolerance=2e-6),
    Move("to shared memory", Tensor.share_memory_, tolerance=0.0),
)


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name)
@every_backend
def test_a_parameter_may_move_in_memory(backend: str, move: Move, seed: int) -> None:
    """State follows it, and the trajectory is that of a parameter that stayed."""
    params = [parameter(*move.shape, backend=backend), parameter(5, backend=backend)]
    options = {"backend": backend, **move.options}
    moved, stayed = (FusedLayca(each, 0.1, **options) for each in (params, clones(params)))
    for _ in range(3):
        grads = random_gradients(params, 2)
        train(moved, grads)
        train(stayed, grads)
        move.do(params[0])
    assert_close(moved, stayed, move.tolerance)


def set_state(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def do(tensor: Tensor) -> None:
        tensor.data = change(tensor.data)

    return do


STATE_MOVES = {
    "copied": set_state(torch.clone),
    "to shared memory": lambda tensor: tensor.share_memory_(),
    "to another layout": set_state(lambda data: data.t().contiguous().t() if data.dim() == 2 else data.clone()),
    "to float64 and back": lambda tensor: set_state(torch.Tensor.double)(tensor),
}


@pytest.mark.parametrize("name", ["momentum_buffer", "radius"])
@pytest.mark.parametrize("move", STATE_MOVES)
@every_backend
def test_state_may_move_in_memory(backend: str, move: str, name: str, seed: int) -> None:
    """Scripts offload optimizers, or share them between processes, by setting ``.data`` of every state tensor."""
    params = [parameter(3, 9, backend=backend), parameter(2, 5, backend=backend)]
    options = {"backend": backend, "momentum": 0.9, "chunks": "all"}
    moved, stayed = (FusedLayca(each, 0.1, **options) for each in (params, clones(params)))
    for _ in range(4):
        grads = random_gradients(params, 1)
        train(moved, grads)
        train(stayed, grads)
        for param in params:
            STATE_MOVES[move](moved.state[param][name])
    grads = random_gradients(params, 1)
    train(moved, grads)
    train(stayed, grads)
    assert_close(moved, stayed, 0.0)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_doubling_a_radius_doubles_the_layer(backend: str, seed: int) -> None:
    """A radius set by hand, through its data, is the one that the next step restores."""
    params = [parameter(7, 9)]
    optimizer = FusedLayca(params, 0.1, backend=backend)
    train(optimizer, random_gradients(params, 1))
    radius = optimizer.state[params[0]]["radius"]
    radius.data = radius.data * 2
    train(optimizer, random_gradients(params, 1))
    assert float(params[0].detach().double().norm()) == pytest.approx(float(radius), rel=1e-6)


@every_backend
def test_a_module_cast_to_float64_trains_on_in_float64(backend: str, seed: int) -> None:
    module = nn.Linear(5, 7).to(parameter(1, backend=backend).device)
    optimizer = FusedLayca(module.parameters(), 0.1, momentum=0.9, backend=backend)
    train(optimizer, random_gradients(list(module.parameters()), 2))
    module.zero_grad()
    module.to(torch.float64)
    weight = module.weight.detach().flatten().clone()
    train(optimizer, random_gradients(list(module.parameters()), 1))
    assert angle_between(weight, module.weight.detach().flatten()) == pytest.approx(math.atan(0.1), rel=1e-12)
    assert optimizer.state[module.weight]["momentum_buffer"].dtype == torch.float64


FORGET = {
    "state.clear()": lambda optimizer: optimizer.state.clear(),
    "state replaced by an empty dict": lambda opt: setattr(opt, "state", collections.defaultdict(dict)),
    "del state[param]": lambda optimizer: [optimizer.state.pop(param) for param in params_of(optimizer)],
    "state of each cleared": lambda optimizer: [optimizer.state[param].clear() for param in params_of(optimizer)],
}


@pytest.mark.parametrize("forget", FORGET.values(), ids=FORGET.keys())
@native_backends
def test_state_thrown_away_is_made_anew(backend: str, forget: Callable[[FusedLayca], Any], seed: int) -> None:
    """The common ways to restart an optimizer; afterwards it must be as good as new."""
    params = [parameter(4, 3, backend=backend), parameter(5, backend=backend)]
    optimizer = FusedLayca(params, 0.1, momentum=0.9, dampening=0.4, backend=backend)
    train(optimizer, random_gradients(params, 2))
    fresh = FusedLayca(clones(params), 0.1, momentum=0.9, dampening=0.4, backend=backend)
    forget(optimizer)
    grads = random_gradients(params, 2)
    train(optimizer, grads)
    train(fresh, grads)
    assert same_bits(contents(optimizer), contents(fresh))


@native_backends
def test_state_tensors_set_by_the_user_are_used(backend: str, seed: int) -> None:
    param = parameter(4, 3, backend=backend)
    optimizer = FusedLayca([param], 0.1, momentum=0.9, backend=backend)
    train(optimizer, random_gradients([param], 2))
    optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    optimizer.state[param]["radius"] = torch.tensor([7.0], dtype=torch.float64)
    grads = random_gradients([param], 1)
    train(optimizer, grads)
    assert relative_distance(optimizer.state[param]["momentum_buffer"], grads[0][0]) <= 1e-7
    assert norm_of(param) == pytest.approx(7.0, rel=1e-6)
