"""Options of a group changed while a run goes on, and what must follow from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from layca_fast import FusedLayca
from layca_fast.commands.verify import angle_between

from ..support import (
    BACKENDS,
    assert_close,
    clones,
    contents,
    copy_of,
    every_backend,
    native_backends,
    norm_of,
    parameter,
    random_gradients,
    relative_distance,
    same_bits,
    train,
)


@dataclass(frozen=True)
class Switch:
    """Options to start with, and what they are set to before each later part of the run."""

    name: str
    start: Mapping[str, Any]
    changes: tuple[Mapping[str, Any], ...]


SWITCHES = (
    Switch("lr", {"momentum": 0.9}, ({"lr": 0.3}, {"lr": 0.0}, {"lr": 0.01})),
    Switch("momentum to 0 and back", {"momentum": 0.9, "dampening": 0.2}, ({"momentum": 0.0}, {"momentum": 0.5})),
    Switch("momentum on from 0", {"momentum": 0.0, "dampening": 0.3}, ({"momentum": 0.8}, {"momentum": 0.9})),
    Switch("nesterov on and off", {"momentum": 0.9}, ({"nesterov": True}, {"nesterov": False})),
    Switch("dampening", {"momentum": 0.9}, ({"dampening": 0.5}, {"dampening": 0.0})),
    Switch("maximize", {"momentum": 0.9}, ({"maximize": True}, {"maximize": False})),
)


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
@every_backend
def test_options_changed_mid_run_act_on_plain_tensors_as_in_sgd(backend: str, switch: Switch, seed: int) -> None:
    """torch.optim.SGD is the authority on its own options; rotation is off, so that the two must agree."""
    params = [parameter(4, 5, backend=backend, dtype=torch.float64), parameter(7, backend=backend, dtype=torch.float64)]
    twins = clones(params)
    ours = FusedLayca(params, 0.05, rotate=False, backend=backend, **switch.start)
    theirs = torch.optim.SGD(twins, 0.05, **switch.start)
    for change in ({}, *switch.changes, {"lr": 0.02}):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(change)
        grads = random_gradients(params, 2)
        train(ours, grads)
        train(theirs, grads)
        assert_close(ours, theirs, tolerance=1e-13)


@every_backend
def test_rotation_switched_off_and_on_again(backend: str, seed: int) -> None:
    """Off: the plain base step. On: back to the radius that the layer had, at the asked angle, buffer untouched."""
    param = parameter(6, 4, backend=backend, dtype=torch.float64)
    optimizer = FusedLayca([param], 0.1, momentum=0.8, backend=backend)
    group = optimizer.param_groups[0]
    radius = norm_of(param)
    train(optimizer, random_gradients([param], 2))
    group["rotate"] = False
    before = copy_of([param, optimizer.state[param]["momentum_buffer"]])
    grad = random_gradients([param], 1)
    train(optimizer, grad)
    step = 0.8 * before[1] + grad[0][0]
    assert relative_distance(param, before[0] - 0.1 * step) <= 1e-14
    group["rotate"] = True
    old = param.detach().flatten().clone()
    train(optimizer, random_gradients([param], 1))
    assert angle_between(old, param.detach().flatten()) == pytest.approx(math.atan(0.1), rel=1e-12)
    assert norm_of(param) == pytest.approx(radius, rel=1e-13)


@every_backend
def test_radius_switched_to_current_and_back(backend: str, seed: int) -> None:
    param = parameter(6, 4, backend=backend, dtype=torch.float64)
    optimizer = FusedLayca([param], 0.1, momentum=0.8, backend=backend)
    initial = norm_of(param)
    train(optimizer, random_gradients([param], 1))
    param.data.mul_(3.0)
    for radius, norm in (("current", 3 * initial), ("initial", initial)):
        optimizer.param_groups[0]["radius"] = radius
        train(optimizer, random_gradients([param], 1))
        assert norm_of(param) == pytest.approx(norm, rel=1e-13)


@every_backend
def test_base_switched_mid_run_keeps_the_momentum(backend: str, seed: int) -> None:
    param = parameter(5, 4, backend=backend, dtype=torch.float64)
    optimizer = FusedLayca([param], 0.1, momentum=0.9, backend=backend)
    train(optimizer, random_gradients([param], 2))
    buffer = copy_of(optimizer.state[param]["momentum_buffer"])
    optimizer.param_groups[0]["base"] = "sgd_amom"
    grads = random_gradients([param], 1)
    train(optimizer, grads)
    assert relative_distance(optimizer.state[param]["momentum_buffer"], 0.9 * buffer + 0.1 * grads[0][0]) <= 1e-14


@native_backends
def test_chunks_changed_mid_run_ask_for_reset_radius(backend: str, seed: int) -> None:
    """A radius per layer cannot be guessed for other layers: a clear error, then new radii from the weights."""
    param = parameter(6, 4, backend=backend, dtype=torch.float64)
    optimizer = FusedLayca([("experts", param)], 0.1, momentum=0.9, backend=backend)
    train(optimizer, random_gradients([param], 2))
    optimizer.param_groups[0]["chunks"] = 3
    param.grad = torch.randn_like(param)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"'radius' of parameter 'experts'.* shape \(1,\) for 3 layers.*reset_radius"):
        optimizer.step()
    assert same_bits(contents(optimizer), before)
    optimizer.reset_radius()
    norms = [norm_of(part) for part in param.chunk(3)]
    optimizer.step()
    assert optimizer.state[param]["radius"].tolist() == pytest.approx(norms, rel=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize(
    "options", [{"momentum": 0.9, "dampening": 0.2}, {"base": "sgd_amom", "chunks": 2}], ids=["sgd", "sgd_amom, chunks"]
)
def test_a_run_may_move_between_backends(
    options: dict[str, Any], dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    """State is the same whichever backend made it."""
    params = [parameter(*shape, dtype=dtype) for shape in ((6, 7), (4, 3, 3), (9,))]
    wandering = FusedLayca(params, 0.05, backend="torch", **options)
    settled = FusedLayca(clones(params), 0.05, backend="torch", **options)
    for _ in range(2):
        for backend in BACKENDS:
            wandering.param_groups[0]["backend"] = backend
            grads = random_gradients(params, 2)
            train(wandering, grads)
            train(settled, grads)
            assert_close(wandering, settled, tolerance)
