"""What no comparison within tolerances can defend: bits that stay, come again, or do not depend on scale."""

import math

import pytest
import torch
from torch import Tensor

from layca_fast import FusedLayca
from layca_fast.commands.verify import angle_between

from ..support import BACKENDS

SHAPES = ((6, 50), (3, 700), (8, 4, 3, 3), (5,))
OPTIONS = (
    {"base": "sgd"},
    {"base": "sgd", "momentum": 0.9, "nesterov": True},
    {"base": "sgd_amom", "momentum": 0.8, "chunks": "all"},
)


def make(backend: str, dtype: torch.dtype = torch.float32, **options: object) -> tuple[list[Tensor], FusedLayca]:
    params = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in SHAPES]
    return params, FusedLayca(params, backend=backend, **options)


def fill_grads(params: list[Tensor], scale: float = 1.0) -> None:
    for param in params:
        param.grad = scale * torch.randn_like(param)


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone().view(torch.int32) for tensor in tensors]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lr_zero_keeps_every_bit(backend: str, options: dict[str, object], seed: int) -> None:
    """Not even renormalised: the radius is far from the norm. And a first step at lr = 0 takes no radius."""
    params, optimizer = make(backend, lr=0.1, **options)
    fill_grads(params)
    optimizer.step()
    with torch.no_grad():
        for param in params:
            param.mul_(1.7)
            param.view(-1)[0] = -0.0
    before, radii = bits(params), [optimizer.state[p]["radius"].clone() for p in params if p.dim() > 1]
    optimizer.param_groups[0]["lr"] = 0.0
    fill_grads(params)
    optimizer.step()
    assert equal(before, bits(params))
    assert equal(radii, [optimizer.state[p]["radius"] for p in params if p.dim() > 1])

    fresh, optimizer = make(backend, lr=0.0, **options)
    fill_grads(fresh)
    optimizer.step()
    assert all(float(optimizer.state[p]["radius"].max()) == 0 for p in fresh if p.dim() > 1)
    optimizer.param_groups[0]["lr"] = 0.1
    norms = [p.detach().double().norm() for p in fresh if p.dim() > 1]
    fill_grads(fresh)
    optimizer.step()
    radii = [optimizer.state[p]["radius"].square().sum().sqrt() for p in fresh if p.dim() > 1]
    torch.testing.assert_close(radii, norms, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["zero", "parallel"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_without_direction_keeps_every_bit(backend: str, kind: str, scale: float, seed: int) -> None:
    """The test is relative, so a gradient of any scale is judged alike; such steps are counted."""
    params, optimizer = make(backend, lr=0.1)
    with torch.no_grad():
        for param in params:
            param.view(-1)[1] = -0.0
    for param in params:
        param.grad = param.detach() * scale if kind == "parallel" and param.dim() > 1 else torch.zeros_like(param)
    before = bits(params)
    optimizer.step()
    assert equal(before, bits(params))
    stats = optimizer.rotation_stats()
    assert all(stats[p].no_direction.tolist() == [1] for p in params if p.dim() > 1)
    assert all(stats[p].angle.tolist() == [0.0] for p in params)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_elements_count_as_zero(backend: str, options: dict[str, object], seed: int) -> None:
    """A step with nan and inf in the gradient equals the step with zeros there; both are counted per layer."""
    params, optimizer = make(backend, lr=0.1, **options)
    twins = [param.detach().clone().requires_grad_() for param in params]
    other = FusedLayca(twins, lr=0.1, backend=backend, **options)
    for _ in range(2):
        fill_grads(params)
        for param, twin in zip(params, twins, strict=True):
            twin.grad = param.grad.clone()
            for i, value in enumerate((math.nan, math.inf, -math.inf)):
                param.grad.view(-1)[i] = value
                twin.grad.view(-1)[i] = 0.0
        optimizer.step()
        other.step()
    assert equal(bits(params), bits(twins))
    stats = optimizer.rotation_stats()
    assert [int(stats[p].non_finite.sum()) for p in params] == [6] * len(params)
    assert all(int(count.non_finite.sum()) == 0 for count in other.rotation_stats().values())
    for state in optimizer.state.values():
        assert all(bool(torch.isfinite(value).all()) for value in state.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflowing_state_counts_as_zero(backend: str, seed: int) -> None:
    """Momentum that overflows float32 must not stay infinite for ever."""
    params, optimizer = make(backend, lr=0.1, momentum=0.9)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
            param.grad.view(-1)[3] = 3e38
        optimizer.step()
    assert all(bool(torch.isfinite(state["momentum_buffer"]).all()) for state in optimizer.state.values())
    assert all(bool(torch.isfinite(param).all()) for param in params)
    assert [int(stats.non_finite.sum()) for stats in optimizer.rotation_stats().values()] == [1] * len(params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_with_non_finite_weights_are_left_alone(backend: str, seed: int) -> None:
    params, optimizer = make(backend, lr=0.1, momentum=0.9)
    with torch.no_grad():
        params[0][2, 3] = math.nan
        params[1][0, 0] = math.inf
    before = bits(params)
    fill_grads(params)
    optimizer.step()
    after, stats = bits(params), optimizer.rotation_stats()
    assert equal(before[:2], after[:2])
    assert not equal(before[2:], after[2:])
    assert [int(stats[p].broken.sum()) for p in params] == [1, 1, 0, 0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_inputs_give_the_same_bits(backend: str, options: dict[str, object], seed: int) -> None:
    """Run after run, for any number of threads, and whatever else shares the batch."""
    shapes = ((40, 50), (3, 700), (5,)) if backend == "triton" else ((400, 500), (3, 70_001), (5,))
    weights = [torch.randn(shape) for shape in shapes]
    grads = [[torch.randn(shape) for shape in shapes] for _ in range(2 if backend == "triton" else 3)]

    def run(extra: int) -> list[Tensor]:
        params = [weight.clone().requires_grad_() for weight in weights]
        others = [torch.randn(30, 30).requires_grad_() for _ in range(extra)]
        optimizer = FusedLayca(others + params, lr=0.05, backend=backend, **options)
        for step in grads:
            fill_grads(others)
            for param, grad in zip(params, step, strict=True):
                param.grad = grad.clone()
            optimizer.step()
        return bits(params)

    threads = torch.get_num_threads()
    first = run(0)
    try:
        # Of torch's threads the interpreter has none.
        for count, extra in ((1, 0), (2, 3), (3, 0), (5, 1))[: 2 if backend == "triton" else None]:
            torch.set_num_threads(count)
            assert equal(first, run(extra)), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_momentum_is_undampened_as_in_torch(backend: str, dtype: torch.dtype, seed: int) -> None:
    """torch.optim.SGD starts the buffer at the first gradient; also for a tensor that joins later."""
    params, optimizer = make(backend, dtype, lr=0.1, momentum=0.9, dampening=0.4, rotate=False)
    twins = [param.detach().clone().requires_grad_() for param in params]
    theirs = torch.optim.SGD(twins, lr=0.1, momentum=0.9, dampening=0.4)
    for step in range(4):
        fill_grads(params)
        if step == 0:
            params[1].grad = None
        for param, twin in zip(params, twins, strict=True):
            twin.grad = None if param.grad is None else param.grad.clone()
        optimizer.step()
        theirs.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_beyond_all_measure_keeps_the_weights(backend: str, seed: int) -> None:
    """1 + lr^2 overflows: no angle can be computed, and nothing may be written."""
    params, optimizer = make(backend, lr=1e200, rotate=True)
    fill_grads(params)
    before = bits(params)
    optimizer.step()
    assert equal(before, bits(params))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e36])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_gradients_turn_by_the_right_angle(backend: str, scale: float, seed: int) -> None:
    """b = -R rho / sigma leaves float32 here, and so do the squares of the gradient."""
    params, optimizer = make(backend, lr=0.1)
    before = [param.detach().double().flatten() for param in params]
    fill_grads(params)
    for param in params:
        # Away from denormals, which may count as zero.
        param.grad = scale * (param.grad.sign() + param.grad)
    optimizer.step()
    for old, param in list(zip(before, params, strict=True))[:3]:
        angle = angle_between(old, param.detach().double().flatten())
        assert angle == pytest.approx(math.atan(0.1), rel=1e-6 + 3e-6 / math.sqrt(param.numel()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_layer_is_found_beside_one_with_nan(backend: str, seed: int) -> None:
    param = torch.randn(4, 5)
    param[1], param[2, 3] = 0.0, math.nan
    param.requires_grad_()
    optimizer = FusedLayca([param], lr=0.1, chunks="all", backend=backend)
    param.grad = torch.randn(4, 5)
    before = bits([param])
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .*rotate=False"):
        optimizer.step()
    assert equal(before, bits([param]))
