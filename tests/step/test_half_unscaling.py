"""unscale_in_step=True on 16-bit parameters: the bits of the standard path, whatever types gradients and state have."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.state.compensation import HALVES

from ..support import contents, copy_of, native_backends, parameter, random_gradients, same_bits, shapes_for, train
from .test_unscaling import OPTIONS, scaler_for, set_scaled, states, with_overflow

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = ((6, 5), (7,), (3, 4, 2), (0, 3), (5, 4))
BROKEN = (0, 1, 4)

#: None: the parameter's own.
GRADIENTS = {"own": (None,) * 5, "float32": (F32,) * 5, "several": (None, F32, None, F32, None)}


def groups_of(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """What rotates, what does not and decays, and one layer per row."""
    return [
        {"params": params[:2]},
        {"params": params[2:4], "rotate": False, "weight_decay": 0.02},
        {"params": params[4:], "chunks": "all"},
    ]


def check_unscaling(
    backend: str, options: dict[str, Any], dtype: torch.dtype, types: Sequence[torch.dtype | None], **more: Any
) -> None:
    params = [parameter(*shape, backend=backend, dtype=dtype) for shape in shapes_for(options, SHAPES)]
    twins = [Parameter(param.detach().clone()) for param in params]
    for param in (*params, *twins):
        param.grad_dtype = None
    capturable = more.pop("capturable")
    common = {"backend": backend, **more, **options}
    ours = FusedLayca(groups_of(params), 0.05, unscale_in_step=True, capturable=capturable, **common)
    plain = FusedLayca(groups_of(twins), 0.05, **common)
    # Powers of two only: scaling then rounds nothing, and the plain run can do without a scaler.
    scaler = scaler_for(params, init_scale=64.0, growth_interval=100)
    for step, row in enumerate(with_overflow(random_gradients(params, 7), BROKEN)):
        grads = [grad.to(each or dtype) for grad, each in zip(row, types, strict=True)]
        given = [None if step == 5 and i == 1 else grad for i, grad in enumerate(grads)]
        set_scaled(ours, scaler, given)
        before, scaled = contents(ours), copy_of([param.grad for param in params])
        scaler.step(ours)
        scaler.update()
        assert same_bits(copy_of([param.grad for param in params]), scaled), "a gradient was modified"
        if step not in BROKEN:
            train(plain, [given])
        elif step:
            assert same_bits(contents(ours), before)
        assert same_bits(copy_of(params), copy_of(twins))
        if step > 1:
            assert same_bits(states(ours), states(plain))


@pytest.mark.parametrize("types", GRADIENTS.values(), ids=GRADIENTS.keys())
@pytest.mark.parametrize("capturable", [False, True], ids=["eager", "capturable"])
@pytest.mark.parametrize("state_dtype", [None, BF16], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("options", [*OPTIONS[1:4], OPTIONS[-1]], ids=str)
@native_backends
def test_the_standard_paths_bits(
    backend: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    capturable: bool,
    types: Sequence[torch.dtype | None],
    seed: int,
) -> None:
    """Skipped steps at the start and later, and a parameter that once has no gradient."""
    check_unscaling(backend, options, dtype, types, state_dtype=state_dtype, capturable=capturable)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_standard_paths_bits_in_triton(dtype: torch.dtype, seed: int) -> None:
    check_unscaling("triton", OPTIONS[2], dtype, GRADIENTS["several"], state_dtype=BF16, capturable=True)
