"""unscale_in_step=True: what GradScaler does before a step on its standard path, the kernels do inside of it."""

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from layca_fast import FusedLayca

from ..support import (
    clones,
    contents,
    copy_of,
    every_backend,
    mixed_optimizer,
    native_backends,
    parameter,
    params_of,
    random_gradients,
    relative_distance,
    same_bits,
    shapes_for,
    train,
)
from .host_support import Recorder

OPTIONS = (
    {"base": "sgd"},
    {"base": "sgd", "momentum": 0.8, "dampening": 0.3},
    {"base": "sgd", "momentum": 0.9, "nesterov": True, "maximize": True},
    {"base": "adam", "betas": (0.7, 0.9), "amsgrad": True},
    {"base": "rmsprop", "centered": True, "momentum": 0.5, "maximize": True},
    {"base": "adagrad"},
    {"base": "lion"},
    {"base": "muon", "momentum": 0.9},
)
F32, BF16 = torch.float32, torch.bfloat16
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def odd_params(backend: str, base: Mapping[str, Any] = {}) -> list[Parameter]:
    """A matrix, a bias, three layers in one tensor, and a tensor without elements."""
    shapes = shapes_for(base, ((6, 5), (7,), (3, 4, 2), (0, 3)))
    return [parameter(*shape, backend=backend) for shape in shapes]


def scaler_for(params: Sequence[Tensor], **options: Any) -> torch.amp.GradScaler:
    """A GradScaler with a scale that is no power of two, so that unscaling rounds."""
    device = params[0].device
    scaler = torch.amp.GradScaler(device.type, **{"init_scale": 1000.0, "growth_interval": 3, **options})
    scaler.scale(torch.zeros((), device=device))
    return scaler


def set_scaled(optimizer: Optimizer, scaler: torch.amp.GradScaler, row: Sequence[Tensor | None]) -> None:
    scale = scaler.get_scale()
    for param, grad in zip(params_of(optimizer), row, strict=True):
        param.grad = None if grad is None else grad * scale


def states(optimizer: Optimizer) -> list[Any]:
    return [copy_of(dict(optimizer.state[param])) for param in params_of(optimizer)]


def with_overflow(rows: list[list[Tensor]], steps: Sequence[int]) -> list[list[Tensor]]:
    """In these steps one element of the first parameter's gradient is infinite or NaN."""
    for step in steps:
        rows[step][0].view(-1)[step] = float("nan") if step % 2 else float("inf")
    return rows


@pytest.mark.parametrize("unscaled", [False, True], ids=["unscaled in the step", "after unscale_()"])
@every_option
@every_backend
def test_the_standard_paths_bits(backend: str, options: dict[str, Any], unscaled: bool, seed: int) -> None:
    """Steps with infinite gradients among them, the first two, and a scale that backs off and grows."""
    params = odd_params(backend, options)
    twins = clones(params)
    ours = FusedLayca(params, 0.05, backend=backend, unscale_in_step=True, **options)
    plain = FusedLayca(twins, 0.05, backend=backend, **options)
    scalers = [scaler_for(each) for each in (params, twins)]
    for step, row in enumerate(with_overflow(random_gradients(params, 9), (0, 1, 5))):
        before = copy_of(params)
        for optimizer, scaler in zip((ours, plain), scalers, strict=True):
            set_scaled(optimizer, scaler, row)
            if unscaled:
                scaler.unscale_(optimizer)
            grads = copy_of([param.grad for param in params_of(optimizer)])
            scaler.step(optimizer)
            scaler.update()
            if optimizer is ours:
                assert same_bits([param.grad.detach() for param in params], grads), "the gradient was modified"
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert same_bits(copy_of(params), copy_of(twins))
        assert same_bits(copy_of(params), before) == (step in (0, 1, 5))
        if step >= 2:
            assert same_bits(
                contents(ours), [[w, g.grad, s] for (w, _, s), g in zip(contents(plain), params, strict=True)]
            )
    assert scalers[0].get_scale() != 1000.0
    stats, expected = ours.rotation_stats(), plain.rotation_stats()
    for param, twin in zip(params, twins, strict=True):
        assert same_bits(vars(stats[param]), vars(expected[twin]))
        assert not stats[param].non_finite.any()


def in_other_memory(optimizer: FusedLayca) -> FusedLayca:
    for param in params_of(optimizer):
        param.data = param.data.clone()
    return optimizer


def resumed(optimizer: FusedLayca) -> FusedLayca:
    options = {"momentum": 0.8, "dampening": 0.3, "unscale_in_step": True}
    other = FusedLayca(clones(params_of(optimizer)), 0.05, **options)
    other.load_state_dict(optimizer.state_dict())
    return other


@pytest.mark.parametrize("interrupt", [in_other_memory, resumed])
@every_backend
def test_a_first_gradient_is_the_first_that_is_taken(
    backend: str, interrupt: Callable[[FusedLayca], FusedLayca], seed: int
) -> None:
    """SGD takes it undampened, also where the run is interrupted while its scale still comes down."""
    params = odd_params(backend)
    ours = FusedLayca(params, 0.05, momentum=0.8, dampening=0.3, backend=backend, unscale_in_step=True)
    plain = FusedLayca(clones(params), 0.05, momentum=0.8, dampening=0.3, backend=backend)
    scaler = scaler_for(params, init_scale=1024.0)
    for step, row in enumerate(with_overflow(random_gradients(params, 5), (0, 1))):
        set_scaled(ours, scaler, row)
        scaler.step(ours)
        scaler.update()
        if step >= 2:
            train(plain, [row])
            assert same_bits(states(ours), states(plain))
        if step in (0, 1, 2):
            ours = interrupt(ours)


@every_backend
def test_a_skipped_step_leaves_everything_as_it_was(backend: str, seed: int) -> None:
    """Weights, states, step counters, radii and counts: of four groups with three bases, one parameter left out."""
    params = [parameter(*shape, backend=backend) for shape in ((6, 5), (7,), (4, 3, 2), (), (5, 4))]
    groups = [dict(group) for group in mixed_optimizer(params, backend).param_groups]
    optimizer = FusedLayca(groups, 0.1, backend=backend, unscale_in_step=True)
    scaler = scaler_for(params)
    rows = with_overflow(random_gradients(params, 4), (2, 3))
    rows[0][0][0, 0] = rows[1][4][1, 1] = 1e30
    for step, row in enumerate(rows):
        set_scaled(optimizer, scaler, [*row[:3], None, row[4]] if step == 3 else row)
        before, counts = contents(optimizer), {p: copy_of(vars(s)) for p, s in optimizer.rotation_stats().items()}
        scaler.step(optimizer)
        if step >= 2:
            assert same_bits(contents(optimizer), before)
            for param, stats in optimizer.rotation_stats().items():
                for name in ("non_finite", "no_direction", "broken"):
                    assert same_bits(getattr(stats, name), counts[param][name])
                assert not stats.angle.any()
        scaler.update()
    assert counts[params[4]]["non_finite"].item() == 1, "its square overflows"


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_host_reads_nothing_of_it(backend: str, seed: int) -> None:
    """Reading a number from a device waits for it. (The torch backend reads on the CPU, for speed, and only there.)"""
    params = odd_params(backend)
    optimizer = FusedLayca(params, 0.05, base="adam", backend=backend, unscale_in_step=True)
    train(optimizer, random_gradients(params, 2))
    for found in (0.0, 1.0):
        optimizer.grad_scale = torch.tensor(512.0, device=params[0].device)
        optimizer.found_inf = torch.tensor(found, device=params[0].device)
        with Recorder() as recorder:
            optimizer.step()
        assert not [name for name in recorder.names if "local_scalar" in name or "nonzero" in name]


@native_backends
def test_several_optimizers_on_one_scaler(backend: str, seed: int) -> None:
    """Each is skipped for its own gradients alone, and all share the scale."""
    sets = [[parameter(4, 3, backend=backend), parameter(5, backend=backend)] for _ in range(3)]
    twins = [clones(params) for params in sets]

    def optimizers(of: list[list[Parameter]]) -> list[Optimizer]:
        return [
            FusedLayca(of[0], 0.05, momentum=0.9, backend=backend, unscale_in_step=True),
            FusedLayca(of[1], 0.02, base="adam", backend=backend),
            torch.optim.SGD(of[2], 0.1, momentum=0.9),
        ]

    ours, plain = optimizers(sets), optimizers(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
    scaler.scale(torch.zeros(()))
    for step in range(8):
        rows = [random_gradients(params, 1)[0] for params in sets]
        broken = step % 4
        if broken < 3:
            rows[broken][1][0] = float("inf")
        for optimizer, row in zip(ours, rows, strict=True):
            set_scaled(optimizer, scaler, row)
        for index, optimizer in enumerate(ours):
            scaler.step(optimizer)
            if index != broken:
                train(plain[index], [rows[index]])
        scaler.update()
        for one, other in zip(ours, plain, strict=True):
            assert same_bits(copy_of(params_of(one)), copy_of(params_of(other)))
            if step:
                assert same_bits(states(one), states(other))


def test_only_who_asks_for_it_announces_it(seed: int) -> None:
    """Lightning refuses to clip gradients of optimizers that do."""
    for optimizer in (
        FusedLayca([parameter(3, 4)], backend="torch", **each) for each in ({}, {"unscale_in_step": False})
    ):
        assert getattr(optimizer, "_step_supports_amp_scaling", False) is False
    optimizer = FusedLayca([parameter(3, 4)], momentum=0.9, backend="torch", unscale_in_step=True)
    train(optimizer, random_gradients(params_of(optimizer), 1))
    loaded = FusedLayca([parameter(3, 4)], backend="torch", unscale_in_step=True)
    loaded.load_state_dict(FusedLayca([parameter(3, 4)], backend="torch").state_dict())
    for each in (optimizer, loaded, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert each._step_supports_amp_scaling is True
        assert "unscale_in_step" not in each.param_groups[0]


@every_backend
def test_without_a_scaler_the_step_is_the_plain_one(backend: str, seed: int) -> None:
    """Nor does one that is switched off, half-way, leave its last scale behind."""
    params = odd_params(backend)
    twins = clones(params)
    options = {"momentum": 0.9, "dampening": 0.4, "backend": backend}
    ours = FusedLayca(params, 0.05, unscale_in_step=True, **options)
    plain = FusedLayca(twins, 0.05, **options)
    on, off = scaler_for(params, init_scale=1024.0), torch.amp.GradScaler(params[0].device.type, enabled=False)
    for step, row in enumerate(random_gradients(params, 6)):
        if step in (2, 3):
            set_scaled(ours, on, row)
            on.step(ours)
            on.update()
        else:
            set_scaled(ours, off, row)
            off.step(ours)
        train(plain, [row])
        assert same_bits(copy_of(params), copy_of(twins))


@native_backends
def test_a_scaler_with_nothing_to_look_at_and_a_scale_of_the_users_own(backend: str, seed: int) -> None:
    """Without any gradient found_inf is the number 0; a grad_scale that was there is multiplied in."""
    params = [parameter(4, 3, backend=backend)]
    twins = clones(params)
    ours = FusedLayca(params, 0.05, momentum=0.9, backend=backend, unscale_in_step=True)
    plain = FusedLayca(twins, 0.05, momentum=0.9, backend=backend)
    scaler_for(params).step(ours)
    assert same_bits(copy_of(params), copy_of(twins))
    (row,), scaler = random_gradients(params, 1), scaler_for(params, init_scale=256.0)
    set_scaled(ours, scaler, [4.0 * row[0]])
    ours.grad_scale = torch.tensor(4.0)
    scaler.step(ours)
    train(plain, [row])
    assert same_bits(contents(ours)[0][2], contents(plain)[0][2])
    assert same_bits(copy_of(params), copy_of(twins))


EDGES = ((-120, F32), (120, BF16), (126.5, F32), (127, F32), (127, BF16))


@pytest.mark.parametrize(("exponent", "dtype"), EDGES, ids=str)
@every_backend
def test_scales_at_the_edges_of_float32(backend: str, exponent: float, dtype: torch.dtype, seed: int) -> None:
    """One over a scale beyond 2**126 is denormal as a float32, which kernels would take for zero."""
    params = [parameter(*shape, backend=backend, dtype=dtype) for shape in ((6, 5), (7,))]
    ours = FusedLayca(params, 0.05, backend=backend, base="adam", unscale_in_step=True)
    plain = FusedLayca(clones(params), 0.05, backend=backend, base="adam")
    scale = torch.tensor(2.0**exponent, device=params[0].device)
    for row in random_gradients(params, 2):
        # What the scaled gradients hold of them: there, neither too large nor too small.
        scaled = [(grad.sign() * (1 + grad.abs() % 1) / 2).to(dtype) * scale.to(dtype) for grad in row]
        ours.grad_scale = scale
        train(ours, [scaled])
        train(plain, [[(grad.double() / scale.double()).to(dtype) for grad in scaled]])
    # The inverse of a scale that is no power of two is rounded, in denormal numbers to fewer bits.
    tolerance = 1e-6 if exponent == 126.5 else 0.0
    for param, twin in zip(params, params_of(plain), strict=True):
        assert relative_distance(ours.effective_weight(param), plain.effective_weight(twin)) <= tolerance
        # Means of opposite gradients can be 0, those of squares cannot.
        assert ours.state[param]["exp_avg_sq"].all()
