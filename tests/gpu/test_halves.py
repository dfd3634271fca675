"""16-bit parameters, and unscaling in the step, on a GPU. For Triton, slow to compile, ``verify`` runs more of them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from layca_fast import FusedLayca, attach
from layca_fast.backends import choose

from ..attach.support import ALL_OPTIMIZERS
from ..optimizer import test_half_training
from ..optimizer.test_half_training import BF16, F32, GRADIENTS, SHAPES, every_base, every_half, groups_of, weights_of
from ..state import test_halves as test_half_state
from ..step import test_unscaling
from ..support import random_gradients, relative_distance, same_bits, shapes_for
from .support import GPU, GPU_BACKENDS, ON_GPU, every_gpu_backend

pytestmark = ON_GPU

CPU = torch.device("cpu")

only_cuda = pytest.mark.parametrize("backend", [name for name in GPU_BACKENDS if name == "cuda"])


@every_half
def test_auto_takes_them_where_it_takes_float32(dtype: torch.dtype, seed: int) -> None:
    param = Parameter(torch.randn(40, 30, device=GPU, dtype=dtype))
    auto, named = (
        FusedLayca([Parameter(param.detach().clone())], 0.03, backend=name) for name in ("auto", GPU_BACKENDS[0])
    )
    (row,) = random_gradients([param], 1)
    for optimizer in (auto, named):
        (each,) = optimizer.param_groups[0]["params"]
        each.grad = row[0].clone()
        optimizer.step()
    assert choose("auto", GPU).name == GPU_BACKENDS[0]
    assert same_bits(weights_of(auto), weights_of(named))


@pytest.mark.parametrize("name", ["AdamW, foreach", "AdamW, fused", "SGD, Nesterov"])
@every_gpu_backend
def test_an_attached_optimizer_of_bfloat16_follows_float32_bit_for_bit(backend: str, name: str, seed: int) -> None:
    params = [Parameter(torch.randn(shape, device=GPU, dtype=BF16)) for shape in ((40, 30), (64, 129))]
    ours = ALL_OPTIMIZERS[name](params, lr=0.03)
    theirs = ALL_OPTIMIZERS[name](twins := [Parameter(param.detach().float()) for param in params], lr=0.03)
    handle = attach(ours, backend=backend)
    attach(theirs, backend=backend)
    for row in random_gradients(params, 4):
        for param, twin, grad in zip(params, twins, row, strict=True):
            param.grad, twin.grad = grad.clone(), grad.float()
        ours.step()
        theirs.step()
    assert all(torch.equal(handle.effective_weight(param), twin) for param, twin in zip(params, twins, strict=True))


@every_base
@only_cuda
def test_bfloat16_follows_float32_bit_for_bit(backend: str, base: Mapping[str, Any], seed: int) -> None:
    test_half_training.test_bfloat16_follows_float32_bit_for_bit(backend, base, seed)


@every_base
@only_cuda
def test_float16_follows_float32(backend: str, base: Mapping[str, Any], seed: int) -> None:
    test_half_training.test_float16_follows_float32(backend, base, seed)


@every_base
@only_cuda
def test_moments_are_rounded_before_the_step_is_made_of_them(backend: str, base: Mapping[str, Any], seed: int) -> None:
    test_half_state.test_moments_of_16_bits_are_rounded_before_the_step_is_made_of_them(backend, base, seed)


@pytest.mark.parametrize("types", GRADIENTS.values(), ids=GRADIENTS.keys())
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@only_cuda
def test_gradients_of_any_type(backend: str, dtype: torch.dtype, types: Any, seed: int) -> None:
    test_half_training.test_gradients_of_any_type(backend, dtype, types, seed)


@every_half
@only_cuda
def test_without_compensation_a_parameter_is_rounded_to_even(backend: str, dtype: torch.dtype, seed: int) -> None:
    test_half_training.test_without_compensation_a_parameter_is_rounded_to_even(backend, dtype, seed)


@every_gpu_backend
def test_layers_of_weights_that_are_not_finite_keep_every_bit(backend: str, seed: int) -> None:
    test_half_training.test_layers_of_weights_that_are_not_finite_keep_every_bit(backend, seed)


@every_half
@every_base
@only_cuda
def test_equals_the_cpu_backend_after_50_steps(
    backend: str, base: Mapping[str, Any], dtype: torch.dtype, seed: int
) -> None:
    start = [torch.randn(shape).to(dtype) for shape in shapes_for(base, SHAPES)]

    def run(name: str, device: torch.device) -> FusedLayca:
        return FusedLayca(
            groups_of([Parameter(each.to(device, copy=True)) for each in start], base), 0.03, backend=name
        )

    both = (run(backend, GPU), run("cpu", CPU))
    for row in random_gradients(start, 50):
        for optimizer in both:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            for param, grad in zip(params, row, strict=True):
                param.grad = grad.to(param.device, copy=True)
            optimizer.step()
    for ours, theirs in zip(*map(weights_of, both), strict=True):
        assert relative_distance(ours, theirs) <= 2e-6


@test_unscaling.every_option
@pytest.mark.parametrize("unscaled", [False, True], ids=["unscaled in the step", "after unscale_()"])
@every_gpu_backend
def test_unscaling_in_the_step(backend: str, options: dict[str, Any], unscaled: bool, seed: int) -> None:
    test_unscaling.test_the_standard_paths_bits(backend, options, unscaled, seed)


@every_gpu_backend
def test_a_skipped_step_leaves_everything_as_it_was(backend: str, seed: int) -> None:
    test_unscaling.test_a_skipped_step_leaves_everything_as_it_was(backend, seed)
