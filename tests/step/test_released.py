"""What a run no longer has, the optimizer does not keep: replaced parameters, state and groups."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca, attach
from layca_fast.state.checks import SparseGradientError

from ..support import every_backend, native_backends, parameter, params_of, random_gradients, train


class Alive:
    """Which of the tensors handed in are still there."""

    def __init__(self) -> None:
        self._all: list[weakref.ref[Any]] = []

    def watch(self, *tensors: Tensor) -> None:
        self._all += [weakref.ref(each) for each in tensors]

    @property
    def count(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self._all)


def states(optimizer: torch.optim.Optimizer, param: Tensor) -> list[Tensor]:
    return [value for value in optimizer.state.get(param, {}).values() if isinstance(value, Tensor)]


def replace(optimizer: torch.optim.Optimizer, alive: Alive) -> None:
    """A new tensor in the place of the first, as pruning and growing do."""
    params = optimizer.param_groups[0]["params"]
    alive.watch(params[0], *states(optimizer, params[0]))
    optimizer.state.pop(params[0], None)
    params[0] = Parameter(torch.randn(params[0].shape, device=params[0].device))


def clear(optimizer: torch.optim.Optimizer, alive: Alive) -> None:
    """All groups anew."""
    groups = [{**group, "params": []} for group in optimizer.param_groups]
    for group, old in zip(groups, optimizer.param_groups, strict=True):
        for param in old["params"]:
            alive.watch(param, *states(optimizer, param))
            group["params"].append(Parameter(torch.randn(param.shape, device=param.device)))
        group.pop("param_names", None)
    optimizer.param_groups.clear()
    optimizer.state.clear()
    for group in groups:
        optimizer.add_param_group(group)


def load(optimizer: torch.optim.Optimizer, alive: Alive) -> None:
    for param in params_of(optimizer):
        alive.watch(*states(optimizer, param))
    # torch's own shares memory with what it loads.
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


CHANGES = {"replaced parameters": replace, "groups anew": clear, "load_state_dict": load}

every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def made(backend: str, **options: Any) -> FusedLayca:
    params = [parameter(4, 3, backend=backend), parameter(5, backend=backend), parameter(2, 2, backend=backend)]
    return FusedLayca(params, **{"lr": 0.1, "momentum": 0.9, "backend": backend, **options})


@every_change
@every_backend
def test_ordinary_steps_keep_nothing(
    backend: str, change: Callable[[torch.optim.Optimizer, Alive], None], seed: int
) -> None:
    optimizer, alive = made(backend), Alive()
    for _ in range(4):
        train(optimizer, random_gradients(params_of(optimizer), 2))
        change(optimizer, alive)
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert alive.count == 0


@every_change
@native_backends
def test_steps_inside_of_backward_keep_nothing(
    backend: str, change: Callable[[torch.optim.Optimizer, Alive], None], seed: int
) -> None:
    optimizer, alive = made(backend), Alive()
    optimizer.step_in_backward()
    for _ in range(4):
        for _ in range(2):
            sum((param * torch.randn_like(param)).sum() for param in params_of(optimizer)).backward()
            optimizer.step()
        change(optimizer, alive)
    sum((param * torch.randn_like(param)).sum() for param in params_of(optimizer)).backward()
    optimizer.step()
    assert alive.count == 0


@every_change
def test_attach_keeps_nothing(change: Callable[[torch.optim.Optimizer, Alive], None], seed: int) -> None:
    optimizer = torch.optim.SGD([Parameter(torch.randn(4, 3)), Parameter(torch.randn(5))], lr=0.1, momentum=0.9)
    attach(optimizer)
    alive = Alive()
    for _ in range(4):
        train(optimizer, random_gradients(params_of(optimizer), 2))
        change(optimizer, alive)
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert alive.count == 0


def test_counts_go_on_for_a_parameter_that_comes_back(seed: int) -> None:
    """As long as somebody holds it: what it was counted is not lost while it is out of the groups."""
    optimizer = made("torch")
    first = params_of(optimizer)[0]
    first.grad = torch.full_like(first, torch.nan)
    train(optimizer, [[torch.full_like(param, torch.nan) for param in params_of(optimizer)]])
    params = optimizer.param_groups[0]["params"]
    params[0] = Parameter(torch.randn(4, 3))
    train(optimizer, random_gradients(params_of(optimizer), 2))
    params[0] = first
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert optimizer.rotation_stats()[first].non_finite.tolist() == [12]


def swap_memory(optimizer: FusedLayca) -> None:
    """Of the second parameter, which makes the plan anew."""
    optimizer._plan.recorded = True
    second = params_of(optimizer)[1]
    second.data = second.data.clone()
    optimizer.step()


def refuse(optimizer: FusedLayca) -> None:
    """The first batch's gradient, after both were looked at."""
    first = params_of(optimizer)[0]
    first.grad = first.grad.to_sparse()
    with pytest.raises(SparseGradientError):
        optimizer.step()


@pytest.mark.parametrize("leave", [swap_memory, refuse])
def test_gradients_that_were_looked_at_are_not_kept(leave: Callable[[FusedLayca], None], seed: int) -> None:
    """Nor those of a batch that takes no step: the plan may be kept for a CUDA graph, or the step raise."""
    params = [parameter(4, 3, backend="cpu"), parameter(4, 3, backend="cpu", dtype=torch.float64)]
    optimizer = FusedLayca(params, 0.1, backend="cpu")
    train(optimizer, random_gradients(params, 2))
    for param in params:
        param.grad = torch.randn_like(param)
    alive = Alive()
    alive.watch(*[param.grad for param in params])
    leave(optimizer)
    optimizer.zero_grad()
    assert alive.count == 0
