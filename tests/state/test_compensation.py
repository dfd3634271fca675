"""A 16-bit parameter and its remainder: which float32 they stand for, whatever bits are in them."""

import pytest
import torch
from torch import Tensor

from layca_fast.reference import weight_of
from layca_fast.state.compensation import HALVES, join, split

from ..support import same_bits

BF16, FP16 = torch.bfloat16, torch.float16

#: Numbers at the edges of both types: zeros, denormals, ties between two neighbours, the largest, and beyond.
EDGES = (
    *(0.0, -0.0, 1.0, -1.0, 2.0**-126, 2.0**-149, -(2.0**-149), 3.4028234663852886e38, float("inf"), float("-inf")),
    *(1 + 2.0**-8, -1 - 2.0**-8, 1 - 2.0**-9, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -2 - 2.0**-10, 2.0**-14, 2.0**-24),
    *(2.0**-25, 1.5 * 2.0**-24, 65504.0, 65519.996, -65520.0, 2.0**-14 - 2.0**-38, 2.0**-16, 2.0**-16 - 2.0**-40),
    *(3.3895313e38, 3.3895316e38, -3.3895316e38),
)


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int32).long()


def any_float32(n: int) -> Tensor:
    """Numbers of all sizes, and the edges; nothing that is not finite but the infinities."""
    random = torch.randint(-(2**31), 2**31, (n,)).int().view(torch.float32)
    return torch.cat([random[random.isfinite()], torch.randn(n), torch.randn(n) * 1e-6, torch.tensor(EDGES)])


def test_bfloat16_and_remainder_are_the_float32(seed: int) -> None:
    weight = any_float32(1 << 16)
    param, remainder = split(weight, BF16)
    assert param.dtype == remainder.dtype == BF16
    # What rounds to infinity stays there.
    weight = torch.where(param.isinf(), param.float(), weight)
    assert weight.isinf().sum() < len(weight) // 1000
    assert same_bits(join(param, remainder), weight)
    assert same_bits(weight_of(param, remainder), weight)


def test_the_bfloat16_is_the_nearest_and_of_two_the_larger(seed: int) -> None:
    weight = any_float32(1 << 16)
    weight = weight[weight.abs() < 3.38e38]
    param, _ = split(weight, BF16)
    upward = (bits_of(weight) & ~0xFFFF) + 0x10000
    smaller, larger = ((bits & ~0xFFFF).int().view(torch.float32).double() for bits in (bits_of(weight), upward))
    wide = weight.double()
    nearest = torch.where((larger - wide).abs() <= (wide - smaller).abs(), larger, smaller)
    assert torch.equal(param.double(), nearest)


def test_float16_and_remainder_are_the_float32_down_to_2_to_the_minus_16(seed: int) -> None:
    near = (torch.randn(1 << 14) * 2.0 ** torch.randint(-24, 12, (1 << 14,))).half().float()
    half_ulp = 2.0 ** (torch.frexp(near).exponent.clamp(min=-13) - 12)
    halfway = near + torch.where(torch.rand(1 << 14) < 0.5, half_ulp, -half_ulp)
    random = torch.randn(1 << 16) * 10.0 ** torch.randint(-5, 4, (1 << 16,))
    weight = torch.cat([any_float32(1 << 16), random, halfway])
    param, remainder = split(weight, FP16)
    assert param.dtype == remainder.dtype == FP16
    assert same_bits(param, weight.half())
    restored = join(param, remainder)
    assert same_bits(weight_of(param, remainder), restored)
    exact = (weight.abs() >= 2.0**-16) & (weight.abs() < 65520)
    assert exact.sum() > 1 << 15
    assert same_bits(restored[exact], weight[exact])
    small = weight.abs() < 2.0**-16
    assert small.sum() > 1 << 15
    error = (restored.double() - weight.double()).abs()[small]
    # What rounds to one unit more than 16 bits hold: halves, and what is next to them.
    tie = (weight.double() - param.double())[small] > 2.0**-25 - 2.0**-41
    assert error[~tie].max() <= 2.0**-41
    assert error[tie].max() == 2.0**-40
    large = weight.abs() >= 65520
    assert same_bits(restored[large], param[large].float())
    assert restored[large].isinf().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nan_stays_nan(dtype: torch.dtype) -> None:
    """Whichever of the many that there are: rounding the bits of this one would make a zero of it."""
    weight = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001]).int().view(torch.float32)
    assert weight.isnan().all()
    param, remainder = split(weight, dtype)
    assert param.isnan().all()
    assert join(param, remainder).isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_remainder_of_other_weights_is_worth_half_an_ulp_at_most(dtype: torch.dtype, seed: int) -> None:
    """Somebody may have written to the parameter. A remainder that split makes can meet any finite parameter."""
    param = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    param = param[param.isfinite()]
    _, remainder = split(torch.randn(len(param)) * 10.0 ** torch.randint(-9, 4, (len(param),)), dtype)
    weight = join(param, remainder)
    assert weight.isfinite().all()
    if dtype == BF16:
        ulp = torch.finfo(BF16).tiny * torch.finfo(BF16).eps
        ulp = (param.double().abs() * torch.finfo(BF16).eps).clamp(min=ulp)
    else:
        ulp = (param.double().abs() * torch.finfo(FP16).eps).clamp(min=2.0**-24)
    assert ((weight.double() - param.double()).abs() <= ulp / 2).all()
    assert weight[param == 0].abs().max() <= 2.0**-25


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_not_finite_stays_so_whatever_remainder_it_meets(dtype: torch.dtype) -> None:
    param = torch.tensor([float("inf"), -float("inf"), float("nan")]).to(dtype).expand(5, 3).contiguous()
    rest = torch.tensor([-(2**15), -1, 0, 1, 2**15 - 1], dtype=torch.int16).view(dtype).unsqueeze(1).expand(5, 3)
    weight = join(param, rest.contiguous())
    assert not weight.isfinite().any()
    assert torch.equal(weight[0, :2], torch.tensor([float("inf"), -float("inf")]))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_any_strides(dtype: torch.dtype, seed: int) -> None:
    weight = torch.randn(6, 8).t()
    param, remainder = split(weight, dtype)
    assert same_bits(join(param, remainder).contiguous(), weight.contiguous())
    every_second = join(param[:, ::2], remainder[:, ::2])
    assert same_bits(every_second.contiguous(), weight[:, ::2].contiguous())
