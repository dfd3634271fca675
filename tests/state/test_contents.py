"""What a checkpoint may hold: what no run can have left is refused by name, and changes nothing."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from layca_fast import FusedLayca, RotationMonitor, attach
from layca_fast.commands.cases import BASE_OPTIONS
from layca_fast.formulas.bases import SQUARES

from ..support import contents, every_backend, parameter, params_of, random_gradients, same_bits, shapes_for, train

BUFFERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def trained(**options: Any) -> FusedLayca:
    params = [("matrix", parameter(4, 3)), ("bias", parameter(5))]
    chosen = {"base": "adam", "amsgrad": True, **options}
    optimizer = FusedLayca(params, 0.1, backend="cpu", **chosen)
    train(optimizer, random_gradients(params_of(optimizer), 3))
    return optimizer


def with_element(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


#: What is done to a saved state, by its name, and what the refusal says.
CORRUPT: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    **{
        f"{name} holds {value}": (name, with_element(value), rf"'{name}' holds {value}")
        for name in BUFFERS
        for value in (math.inf, -math.inf, math.nan)
    },
    **{f"{name} is negative": (name, with_element(-1e-3), f"'{name}' holds -0.001") for name in BUFFERS[1:]},
    **{
        f"radius is {value}": ("radius", with_element(value), "'radius' holds")
        for value in (math.nan, math.inf, 1e38, -1e38)
    },
    **{
        f"step is {value!r}": ("step", lambda _, value=value: value, "'step' is")
        for value in (math.nan, -3, math.inf, "3", [3], torch.tensor(math.nan), torch.tensor(-3.0))
    },
    **{
        f"{name} is a {type(value).__name__}": (name, lambda _, value=value: value, f"'{name}' is a")
        for name in ("exp_avg", "radius")
        for value in ("text", [0.0] * 12, 0.5, {"a": 1})
    },
    "exp_avg is of integers": ("exp_avg", lambda tensor: tensor.long(), "'exp_avg' has dtype torch.int64"),
    "exp_avg is complex": ("exp_avg", lambda tensor: tensor.to(torch.complex64), "'exp_avg' has dtype torch.complex64"),
    "exp_avg has another shape": ("exp_avg", lambda tensor: tensor[:-1], "'exp_avg' has shape"),
}


@pytest.mark.parametrize(("name", "change", "message"), CORRUPT.values(), ids=CORRUPT)
def test_what_no_run_can_have_left_is_refused(name: str, change: Callable[[Any], Any], message: str, seed: int) -> None:
    saved = copy.deepcopy(trained().state_dict())
    saved["state"][0][name] = change(saved["state"][0][name])
    loading = trained()
    before, groups = contents(loading), copy.deepcopy(loading.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=rf"{message}.* for parameter 'matrix'|{message}.*parameter 'matrix'"):
        loading.load_state_dict(saved)
    assert same_bits(contents(loading), before)
    assert loading.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("options", BASE_OPTIONS, ids=str)
def test_what_runs_leave_is_taken(options: dict[str, Any], seed: int) -> None:
    """Of every base, huge and tiny gradients and layers without a radius yet included."""
    params = [parameter(*shape) for shape in shapes_for(options, ((4, 3), (5,), (2, 0)))]
    optimizer = FusedLayca(params, 0.1, backend="cpu", **options)
    rows = random_gradients(params, 4)
    train(optimizer, [[grad * scale for grad in row] for row, scale in zip(rows, (0.0, 1e18, 1e-30, 1.0), strict=True)])
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert same_bits(saved["state"], optimizer.state_dict()["state"])


def of_torch(make: Callable[[list[Parameter]], torch.optim.Optimizer]) -> dict[str, Any]:
    params = [parameter(4, 3), parameter(5)]
    optimizer = make(params)
    train(optimizer, random_gradients(params, 2))
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("make", "options", "lacking"),
    [
        (lambda params: torch.optim.Adamax(params), {"base": "adam"}, "exp_avg_sq"),
        (lambda params: torch.optim.SGD(params, 0.1, momentum=0.9), {"base": "rmsprop", "momentum": 0.9}, "square_avg"),
        (lambda params: torch.optim.NAdam(params), {"base": "adam"}, None),
    ],
    ids=["Adamax under adam", "SGD under rmsprop", "NAdam under adam"],
)
def test_means_without_the_squares_they_are_divided_by_are_refused(
    make: Callable[[list[Parameter]], torch.optim.Optimizer], options: dict[str, Any], lacking: str | None, seed: int
) -> None:
    optimizer = FusedLayca([parameter(4, 3), parameter(5)], 0.1, backend="cpu", **options)
    if lacking is None:
        with pytest.warns(UserWarning, match="another optimizer wrote"):
            optimizer.load_state_dict(of_torch(make))
        return
    with pytest.raises(ValueError, match=f"no '{lacking}'"):
        optimizer.load_state_dict(of_torch(make))
    assert not optimizer.state


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e38])
def test_an_attached_optimizer_refuses_radii_that_are_none(value: float, seed: int) -> None:
    param = parameter(4, 3)
    optimizer = torch.optim.SGD([param], 0.1)
    attach(optimizer)
    train(optimizer, random_gradients([param], 2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["radius"].fill_(value)
    before = contents(optimizer)
    with pytest.raises(ValueError, match="'radius' holds"):
        optimizer.load_state_dict(saved)
    assert same_bits(contents(optimizer), before)


@pytest.mark.parametrize("options", BASE_OPTIONS, ids=str)
@every_backend
def test_no_weight_moves_by_what_a_broken_state_is_cleaned_to(backend: str, options: dict[str, Any], seed: int) -> None:
    """A state set by hand is not looked through; the step it makes is one of ordinary length, and what is stored is
    finite.
    """
    for name_index in range(3):
        params = [parameter(*shape, backend=backend) for shape in shapes_for(options, ((4, 4), (70,)))]
        optimizer = FusedLayca(params, 1e-3, rotate=False, backend=backend, **options)
        train(optimizer, random_gradients(params, 3))
        for value in (math.inf, math.nan, -math.inf):
            for param in params:
                names = [name for name in optimizer.state[param] if name not in ("step", "radius")]
                if name_index < len(names):
                    optimizer.state[param][names[name_index]].view(-1)[3] = value
            before = [param.detach().clone() for param in params]
            train(optimizer, random_gradients(params, 1))
            for param, old in zip(params, before, strict=True):
                # Gradients are of size 1, and the longest step is Adam's own, some 30 per unit of lr.
                assert float((param.detach() - old).abs().max()) < 1e-3 * 60
                for name, state in optimizer.state[param].items():
                    assert bool(state.isfinite().all()), name
                    assert name not in SQUARES or bool((state >= 0).all())


@pytest.mark.parametrize("options", BASE_OPTIONS, ids=str)
def test_backends_agree_on_what_a_broken_state_becomes(options: dict[str, Any], seed: int) -> None:
    params = [parameter(*shape) for shape in shapes_for(options, ((4, 3), (5,)))]
    optimizer = FusedLayca(params, 0.1, backend="torch", **options)
    train(optimizer, random_gradients(params, 2))
    for param in params:
        for state in optimizer.state[param].values():
            if state.shape == param.shape:
                state.view(-1)[::2] = math.inf
    others = []
    rows = random_gradients(params, 1)
    for backend in ("torch", "cpu"):
        twin = copy.deepcopy(optimizer)
        for group in twin.param_groups:
            group["backend"] = backend
        train(twin, rows)
        others.append(contents(twin))
    for ours, theirs in zip(*others, strict=True):
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[2], theirs[2])


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(name)


def cut(name: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state[name] = state[name][:-1]

    return change


@pytest.mark.parametrize(
    "change",
    [*map(cut, ("steps", "rotation", "angle", "norm", "start_squares")), *map(without, ("steps", "norm", "start"))],
)
def test_a_monitor_is_as_it_was_after_a_state_that_it_refused(
    change: Callable[[dict[str, Any]], None], seed: int
) -> None:
    model = nn.Linear(4, 3, bias=False)
    monitor = RotationMonitor(model)
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(0.1 * torch.randn(3, 4))
        monitor.record()
    saved = copy.deepcopy(monitor.state_dict())
    change(saved)
    before = copy.deepcopy(monitor.state_dict())
    with pytest.raises(ValueError, match="state_dict: "):
        monitor.load_state_dict(saved)
    assert same_bits(monitor.state_dict(), before)
