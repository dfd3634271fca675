"""16-bit parameters train as float32 ones: parameter and remainder are the weight of a float32 run, bit for bit."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.commands.cases import BASE_OPTIONS
from layca_fast.formulas.bases import BASES

from ..support import (
    copy_of,
    device_of,
    every_backend,
    native_backends,
    norm_of,
    on_every_backend,
    parameter,
    params_of,
    random_gradients,
    relative_distance,
    same_bits,
    shapes_for,
    train,
)

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
every_half = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
every_base = pytest.mark.parametrize("base", BASE_OPTIONS, ids=str)

#: The interpreter takes milliseconds per tile.


def steps_of(backend: str) -> int:
    return 3 if backend == "triton" else 30


SHAPES = ((17, 31), (3, 5, 7), (33, 40), (37,), ())


def groups_of(params: Sequence[Tensor], base: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Both rules, both radii, chunks, and plain tensors with weight decay."""
    return [
        {"params": params[:1], **base},
        {"params": params[1:2], **base, "rule": "hyperball", "chunks": "all", "maximize": True},
        {"params": params[2:3], **base, "chunks": 3, "radius": "current"},
        {"params": params[3:], **base, "rotate": False, "weight_decay": 0.05, "lr": 0.003},
    ]


def float32_of(params: Sequence[Tensor]) -> list[Parameter]:
    return [Parameter(param.detach().float()) for param in params]


def weights_of(optimizer: FusedLayca) -> list[Tensor]:
    return [optimizer.effective_weight(param) for param in params_of(optimizer)]


def states_of(optimizer: FusedLayca) -> list[dict[str, Tensor]]:
    """Copies of every state but the remainder."""
    states = [optimizer.state.get(param, {}) for param in params_of(optimizer)]
    return [{name: copy_of(each[name]) for name in each if name != "remainder"} for each in states]


def twins(dtype: torch.dtype, backend: str, base: Mapping[str, Any], **more: Any) -> tuple[FusedLayca, FusedLayca]:
    """An optimizer of 16-bit parameters, and one of float32 parameters that start from the same numbers."""
    params = [parameter(*shape, backend=backend, dtype=dtype) for shape in shapes_for(base, SHAPES)]
    both = [FusedLayca(groups_of(each, base), 0.02, backend=backend, **more) for each in (params, float32_of(params))]
    return both[0], both[1]


@on_every_backend("base", BASE_OPTIONS, every=2)
def test_bfloat16_follows_float32_bit_for_bit(backend: str, base: Mapping[str, Any], seed: int) -> None:
    """Weights, moments, counts of steps and radii; and what is seen of the weight is it, rounded."""
    ours, theirs = twins(BF16, backend, base)
    before = weights_of(ours)
    for row in random_gradients(params_of(ours), steps_of(backend)):
        train(ours, [row])
        train(theirs, [[grad.float() for grad in row]])
    assert same_bits(weights_of(ours), copy_of(params_of(theirs)))
    assert same_bits(states_of(ours), states_of(theirs))
    assert not any(same_bits(weight, old) for weight, old in zip(weights_of(ours), before, strict=True))
    for param, weight in zip(params_of(ours), weights_of(ours), strict=True):
        assert ours.state[param]["remainder"].dtype == BF16
        # Rounded to even, it differs where the weight is a tie.
        close = (param.float() - weight).abs() <= (weight.bfloat16().float() - weight).abs()
        assert close.all()


@every_base
@native_backends
def test_float16_follows_float32(backend: str, base: Mapping[str, Any], seed: int) -> None:
    ours, theirs = twins(FP16, backend, base)
    for row in random_gradients(params_of(ours), steps_of(backend)):
        train(ours, [row])
        train(theirs, [[grad.float() for grad in row]])
    for weight, expected in zip(weights_of(ours), params_of(theirs), strict=True):
        assert relative_distance(weight, expected) <= 1e-7


@pytest.mark.parametrize("base", BASE_OPTIONS[1::4], ids=str)
def test_float16_follows_float32_in_triton(base: Mapping[str, Any], seed: int) -> None:
    test_float16_follows_float32("triton", base, seed)


@pytest.mark.parametrize(
    "base", [{"momentum": 0.9}, pytest.param({"base": "adam"}, marks=pytest.mark.exhaustive)], ids=str
)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("torch", marks=pytest.mark.exhaustive)])
def test_float16_is_within_a_millionth_after_1000_steps(backend: str, base: Mapping[str, Any], seed: int) -> None:
    """Down to weights of 1e-5, of which float16 itself holds 8 bits; and of a bias that starts from zero."""
    params = [Parameter(torch.randn(40, 50).mul(scale).half()) for scale in (1.0, 1e-3, 1e-5)]
    assert norm_of(params[-1]) / math.sqrt(2000) == pytest.approx(1e-5, rel=0.1)
    params.append(Parameter(torch.zeros(50).half()))
    ours = FusedLayca(params, 0.01, backend=backend, **base)
    theirs = FusedLayca(float32_of(params), 0.01, backend=backend, **base)
    for _ in range(1000):
        for param, twin in zip(params, params_of(theirs), strict=True):
            param.grad = torch.randn(param.shape).half()
            twin.grad = param.grad.float()
        ours.step()
        theirs.step()
    for weight, expected in zip(weights_of(ours), params_of(theirs), strict=True):
        assert relative_distance(weight, expected) <= 1e-6


GRADIENTS: Mapping[str, Sequence[torch.dtype]] = {
    "float32": (F32, F32, F32, F32, F32),
    "float64": (torch.float64,) * 5,
    "float16": (FP16,) * 5,
    "several": (BF16, F32, BF16, torch.float64, FP16),
}


@pytest.mark.parametrize("types", GRADIENTS.values(), ids=GRADIENTS.keys())
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@every_backend
def test_gradients_of_any_type(backend: str, dtype: torch.dtype, types: Sequence[torch.dtype], seed: int) -> None:
    """They count as float32, whatever they were a step before; a missing one changes nothing."""
    ours, theirs = twins(dtype, backend, {"momentum": 0.9, "nesterov": True})
    for step, row in enumerate(random_gradients(params_of(ours), 4)):
        grads = [grad.to(each) for grad, each in zip(row, types if step % 2 else [dtype] * 5, strict=True)]
        for i, (param, twin, grad) in enumerate(zip(params_of(ours), params_of(theirs), grads, strict=True)):
            param.grad_dtype = None
            missing = step > 1 and i == 1
            param.grad, twin.grad = (None, None) if missing else (grad, grad.float())
        before = copy_of(grads)
        ours.step()
        theirs.step()
        assert same_bits(copy_of(grads), before)
    assert same_bits(weights_of(ours), copy_of(params_of(theirs)))


def turned_in_a_plane(dtype: torch.dtype, lr: float, backend: str, **options: Any) -> float:
    """The angle in radians, over all turns, by which 1,000 steps along the tangent of a circle turn the weights."""
    plane = torch.linalg.qr(torch.randn(3000, 2, dtype=torch.float64)).Q
    param = Parameter((plane[:, :1] * 50).to(dtype))
    optimizer = FusedLayca([param], lr, backend=backend, **options)

    def place() -> Tensor:
        return plane.t() @ optimizer.effective_weight(param).double().flatten()

    total, old = 0.0, place()
    for _ in range(1000):
        # Along the tangent in the plane, against which a step goes.
        ahead = plane @ torch.stack((-old[1], old[0]))
        param.grad = -ahead.view_as(param).to(dtype)
        optimizer.step()
        new = place()
        total += math.atan2(float(old[0] * new[1] - old[1] * new[0]), float(old @ new))
        old = new
    return total


@pytest.mark.parametrize("lr", [1e-2, pytest.param(1e-3, marks=pytest.mark.exhaustive), 1e-4])
@every_half
@native_backends
def test_weights_turn_by_what_is_asked(backend: str, dtype: torch.dtype, lr: float, seed: int) -> None:
    assert turned_in_a_plane(dtype, lr, backend) == pytest.approx(1000 * math.atan(lr), rel=1e-3)


@pytest.mark.filterwarnings("ignore:compensate=False")
@pytest.mark.parametrize(("lr", "most"), [(1e-3, 0.6), (1e-4, 0.25)])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("torch", marks=pytest.mark.exhaustive)])
def test_without_compensation_bfloat16_loses_the_rotation(backend: str, lr: float, most: float, seed: int) -> None:
    """As the documentation says: rounded to nearest, a weight stays where a step is less than half an ulp of it."""
    turned = turned_in_a_plane(BF16, lr, backend, compensate=False)
    assert turned < most * 1000 * math.atan(lr)


@every_half
@every_backend
def test_without_compensation_a_parameter_is_rounded_to_even(backend: str, dtype: torch.dtype, seed: int) -> None:
    ours, theirs = twins(dtype, backend, {"momentum": 0.9}, compensate=False)
    start = copy_of(params_of(ours))
    train(ours, (grads := random_gradients(params_of(ours), 1)))
    train(theirs, [[grad.float() for grad in grads[0]]])
    assert all("remainder" not in ours.state[param] for param in params_of(ours))
    assert not same_bits(copy_of(params_of(ours)), start)
    assert same_bits(copy_of(params_of(ours)), [param.detach().to(dtype) for param in params_of(theirs)])
    assert same_bits(weights_of(ours), copy_of(params_of(ours)))


class Rates:
    """Runs steps at the given rates and counts the warnings."""

    def __init__(self, *params: Tensor, **options: Any) -> None:
        self.optimizer = FusedLayca([*params], **{"lr": 0.1, "backend": "torch", **options})

    def warned(self, lr: float | Tensor) -> list[str]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for param in params_of(self.optimizer):
            param.grad = torch.randn_like(param)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.optimizer.step()
        assert all(each.filename == __file__ for each in caught)
        return [str(each.message) for each in caught]


@pytest.mark.parametrize(("dtype", "smallest"), [(BF16, 2.0**-8), (FP16, 2.0**-11)], ids=str)
def test_rates_below_what_the_type_carries_are_warned_of_once(dtype: torch.dtype, smallest: float, seed: int) -> None:
    """A scheduler may come to them late. The message says the smallest rotation that the type can carry."""
    rates = Rates(parameter(4, 3, dtype=dtype), parameter(3), compensate=False)
    assert rates.warned(smallest) == []
    assert rates.warned(0.0) == []
    (message,) = rates.warned(0.9 * smallest)
    assert f"{dtype} can carry is {smallest:g} radians" in message
    assert "parameter 0 of group 0" in message
    assert rates.warned(0.5 * smallest) == []


@pytest.mark.parametrize(
    ("shape", "options"),
    [((4, 3), {}), ((4, 3), {"compensate": True}), ((12,), {"compensate": False, "rotate": False})],
    ids=["default", "compensated", "does not rotate"],
)
def test_nobody_else_is_warned(shape: tuple[int, ...], options: dict[str, Any], seed: int) -> None:
    assert Rates(parameter(*shape, dtype=BF16), **options).warned(1e-5) == []
    assert Rates(parameter(4, 3), compensate=False).warned(torch.tensor(1e-5)) == []


@every_backend
def test_compensation_may_differ_between_groups(backend: str, seed: int) -> None:
    params = [parameter(4, 3, backend=backend, dtype=BF16) for _ in range(3)]
    groups = [{"params": params[:1], "compensate": False}, {"params": params[1:2], "compensate": True}, params[2:]]
    groups[2] = {"params": params[2:]}
    optimizer = FusedLayca(groups, 0.02, backend=backend)
    train(optimizer, random_gradients(params, 1))
    assert ["remainder" in optimizer.state[param] for param in params] == [False, True, True]


def test_bases_cover_every_base() -> None:
    assert {options["base"] for options in BASE_OPTIONS} == set(BASES)


@every_backend
def test_layers_of_weights_that_are_not_finite_keep_every_bit(backend: str, seed: int) -> None:
    """Beside a layer that turns, in the same tensor."""
    param = parameter(3, 40, backend=backend, dtype=BF16)
    with torch.no_grad():
        param.view(torch.int16)[1, :2] = torch.tensor([0x7FA1, -1], dtype=torch.int16)
    before = copy_of(param)
    optimizer = FusedLayca([param], 0.02, chunks="all", momentum=0.9, backend=backend)
    train(optimizer, random_gradients([param], 2))
    assert same_bits(param[1].detach(), before[1])
    assert not same_bits(param[0].detach(), before[0])
    assert optimizer.rotation_stats()[param].broken.tolist() == [0, 2, 0]


@every_half
@every_backend
def test_radii_and_norms_are_those_of_the_effective_weight(backend: str, dtype: torch.dtype, seed: int) -> None:
    param = parameter(30, 40, backend=backend, dtype=dtype)
    start = norm_of(param)
    optimizer = FusedLayca([param], 0.02, backend=backend)
    train(optimizer, random_gradients([param], 3))
    assert float(optimizer.state[param]["radius"]) == pytest.approx(start, rel=1e-12)
    assert norm_of(optimizer.effective_weight(param)) == pytest.approx(start, rel=2e-7)
    assert device_of(backend) == param.device
