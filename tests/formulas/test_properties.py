"""What holds for any weights, gradients and rates: properties searched by hypothesis."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from layca_fast import FusedLayca
from layca_fast.commands.verify import angle_between, angle_tolerance

from ..support import BACKENDS

NATIVE = [name for name in BACKENDS if name != "triton"]
search = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

rates = st.floats(1e-4, 3.0)
shapes = st.tuples(st.integers(2, 40), st.integers(1, 60)).filter(lambda shape: math.prod(shape) >= 3)
seeds = st.integers(0, 2**31)
base_options = st.sampled_from(
    [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}, {"base": "sgd_amom", "momentum": 0.9}]
)
any_base = st.one_of(
    base_options,
    st.sampled_from(
        [
            {"base": "rmsprop", "centered": True},
            {"base": "rmsprop", "momentum": 0.9},
            {"base": "adagrad"},
            {"base": "adam"},
            {"base": "adam", "amsgrad": True, "betas": (0.5, 0.6)},
            {"base": "lion"},
        ]
    ),
)
scales = st.floats(-30, 30).map(lambda exponent: 10.0**exponent)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def train(weights: list[Tensor], grads: list[list[Tensor]], backend: str, lr: float, **options: object) -> list[Tensor]:
    """The weights after one step on each of ``grads``."""
    params = [weight.clone().requires_grad_() for weight in weights]
    # Also a matrix of one column.
    optimizer = FusedLayca(params, lr=lr, backend=backend, **{"rotate": True, **options})
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("backend", NATIVE)
@search
@given(seed=seeds, shape=shapes, lr=rates, options=any_base)
def test_the_angle_is_atan_lr(backend: str, seed: int, shape: tuple[int, int], lr: float, options: dict) -> None:
    weight, *grads = draw(seed, 4, *shape)
    before = weight
    for count in (1, 2, 3):
        (after,) = train([weight], [[grad] for grad in grads[:count]], backend, lr, **options)
        angle = angle_between(before.double().flatten(), after.double().flatten())
        assert abs(angle / math.atan(lr) - 1) <= angle_tolerance(torch.float32, math.atan(lr), weight.numel())
        before = after


@pytest.mark.parametrize(
    ("backend", "steps"),
    [("cpu", 10_000), ("torch", 2000), pytest.param("torch", 10_000, marks=pytest.mark.exhaustive)],
)
def test_the_norm_is_kept_over_thousands_of_steps(backend: str, steps: int, seed: int) -> None:
    whole, cut = (torch.randn(8, 25).requires_grad_() for _ in range(2))
    groups = [{"params": [whole], "momentum": 0.9}, {"params": [cut], "base": "sgd_amom", "chunks": 4}]
    optimizer = FusedLayca(groups, lr=0.05, backend=backend)

    def norms() -> Tensor:
        layers = [whole.detach().double().view(1, -1), *cut.detach().double().chunk(4)]
        return torch.stack([layer.norm() for layer in layers])

    before, noise = norms(), torch.randn(100, 8, 25)
    for step in range(steps):
        whole.grad = cut.grad = noise[step % 100]
        optimizer.step()
    torch.testing.assert_close(norms(), before, rtol=2e-7, atol=0)


@pytest.mark.parametrize("backend", NATIVE)
@search
@given(seed=seeds, shape=shapes, lr=rates, options=base_options, scale=scales)
def test_scaling_a_layers_gradient_changes_nothing(
    backend: str, seed: int, shape: tuple[int, int], lr: float, options: dict, scale: float
) -> None:
    """Per layer, from 1e-30 to 1e30, where the base has no eps: only rounding differs, and momentum keeps the scale."""
    weight, *grads = draw(seed, 4, *shape)
    (plain,) = train([weight], [[grad] for grad in grads], backend, lr, **options)
    (scaled,) = train([weight], [[grad * scale] for grad in grads], backend, lr, **options)
    assert float((plain.double() - scaled.double()).norm()) <= 2e-5 * float(weight.norm()) * max(1.0, lr)


@pytest.mark.parametrize("backend", NATIVE)
@search
@given(seed=seeds, shape=shapes, lr=rates, options=any_base, exponent=st.integers(-30, 30))
def test_scaling_the_weights_scales_the_result(
    backend: str, seed: int, shape: tuple[int, int], lr: float, options: dict, exponent: int
) -> None:
    """By powers of two, so exactly as far as the weights' float32 is concerned."""
    weight, *grads = draw(seed, 4, *shape)
    steps = [[grad] for grad in grads]
    (plain,) = train([weight], steps, backend, lr, **options)
    (scaled,) = train([weight * 2.0**exponent], steps, backend, lr, **options)
    distance = float((plain.double() - scaled.double() / 2.0**exponent).norm())
    assert distance <= 2e-5 * float(weight.norm()) * max(1.0, lr)


@pytest.mark.parametrize("backend", NATIVE)
@search
@given(seed=seeds, sizes=st.lists(shapes, min_size=2, max_size=6), lr=rates, options=any_base, data=st.data())
def test_layers_do_not_know_of_each_other(
    backend: str, seed: int, sizes: list[tuple[int, int]], lr: float, options: dict, data: st.DataObject
) -> None:
    """Alone, or in any company and order: the same bits."""
    weights = [draw(seed + i, *shape) for i, shape in enumerate(sizes)]
    steps = [[draw(seed + 100 * step + i, *shape) for i, shape in enumerate(sizes)] for step in (1, 2)]
    together = train(weights, steps, backend, lr, **options)
    order = data.draw(st.permutations(range(len(sizes))))
    shuffled = train([weights[i] for i in order], [[step[i] for i in order] for step in steps], backend, lr, **options)
    for place, i in enumerate(order):
        alone = train([weights[i]], [[step[i]] for step in steps], backend, lr, **options)[0]
        assert torch.equal(together[i], shuffled[place])
        assert torch.equal(together[i], alone)


@pytest.mark.parametrize("backend", NATIVE)
@search
@given(seed=seeds, rows=st.integers(1, 6), chunks=st.integers(1, 6), width=st.integers(2, 400), options=base_options)
def test_chunks_equal_separate_tensors(
    backend: str, seed: int, rows: int, chunks: int, width: int, options: dict
) -> None:
    weight, *grads = draw(seed, 4, rows * chunks, width)
    (whole,) = train([weight], [[grad] for grad in grads], backend, 0.1, chunks=chunks, **options)
    parts = train(list(weight.chunk(chunks)), [list(grad.chunk(chunks)) for grad in grads], backend, 0.1, **options)
    assert torch.equal(whole, torch.cat(parts))


@search
@given(seed=seeds, sine=st.floats(1e-5, 0.5), n=st.integers(10, 2000), backend=st.sampled_from(NATIVE))
def test_nearly_parallel_steps(seed: int, sine: float, n: int, backend: str) -> None:
    """In float64 storage the angle is exact to 1e-6 however small the orthogonal part, down to a sine of 1e-5."""
    weight, noise = draw(seed, 2, 2 * n, 5, dtype=torch.float64)
    orthogonal = noise - (noise * weight).sum() / weight.square().sum() * weight
    grad = weight / weight.norm() + sine * orthogonal / orthogonal.norm()
    (after,) = train([weight], [[grad]], backend, 0.05)
    assert angle_between(weight.flatten(), after.flatten()) == pytest.approx(math.atan(0.05), rel=1e-6)
