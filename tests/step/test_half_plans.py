"""16-bit parameters in the optimizer's surroundings: plans, casts, other hands, graphs, memory, Triton."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler

from layca_fast import FusedLayca
from layca_fast import optimizer as optimizer_module
from layca_fast.commands.cases import BASE_OPTIONS
from layca_fast.state.compensation import HALVES
from layca_fast.step.plan import Plan

from ..state.test_halves import through_file
from ..support import (
    clones,
    contents,
    copy_of,
    every_backend,
    native_backends,
    parameter,
    params_of,
    random_gradients,
    relative_distance,
    same_bits,
    train,
)
from .capture_support import record

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Every plan that is made."""
    made: list[Plan] = []

    def making(*args: Any, **more: Any) -> Plan:
        made.append(Plan(*args, **more))
        return made[-1]

    monkeypatch.setattr(optimizer_module, "Plan", making)
    return made


@pytest.mark.parametrize("dtype", [BF16, FP16, F32], ids=str)
@native_backends
def test_gradients_that_come_and_go_keep_the_plan(
    backend: str, dtype: torch.dtype, plans: list[Plan], seed: int
) -> None:
    """Also of tensors whose base needs no state; once each has been seen, nothing is left to find out."""
    params = [parameter(4, 3, dtype=dtype), parameter(5, dtype=dtype), parameter(6, dtype=dtype)]
    optimizer = FusedLayca(params, 0.1, backend=backend)
    for number in range(8):
        (row,) = random_gradients(params, 1)
        before = copy_of(params)
        train(optimizer, [[grad if i == number % 3 else None for i, grad in enumerate(row)]])
        moved = [not same_bits(param.detach(), old) for param, old in zip(params, before, strict=True)]
        assert moved == [i == number % 3 for i in range(3)]
    assert len(plans) == 3


@native_backends
def test_remainders_go_with_compensation(backend: str, seed: int) -> None:
    """At the next step, whether or not the parameter has a gradient for it: nothing completes later weights."""
    params = [parameter(4, 3, dtype=BF16), parameter(5, dtype=BF16), parameter(6, dtype=BF16)]
    optimizer = FusedLayca(params, 0.01, backend=backend)
    train(optimizer, random_gradients(params, 2))
    optimizer.param_groups[0]["compensate"] = False
    (row,) = random_gradients(params, 1)
    train(optimizer, [[row[0], None, None]])
    assert not any("remainder" in optimizer.state[param] for param in params)
    assert all(same_bits(optimizer.effective_weight(param), param.detach()) for param in params)


@pytest.mark.parametrize("with_gradient", [True, False])
@every_half
@native_backends
def test_a_cast_to_the_other_16_bit_type_drops_the_remainder(
    backend: str, dtype: torch.dtype, with_gradient: bool, seed: int
) -> None:
    """It goes on from what the cast has left, as float32 parameters of these numbers do."""
    (other,) = {BF16, FP16} - {dtype}
    params = [parameter(8, 6, dtype=dtype), parameter(9, dtype=dtype)]
    optimizer = FusedLayca(params, 0.01, rotate=False, backend=backend)
    train(optimizer, random_gradients(params, 2))
    assert all(optimizer.state[param]["remainder"].view(torch.int16).any() for param in params)
    for param in params:
        param.grad, param.data = None, param.data.to(other)
        assert same_bits(optimizer.effective_weight(param), param.detach())
    twins = [Parameter(param.detach().float()) for param in params]
    plain = FusedLayca(twins, 0.01, rotate=False, backend=backend)
    for used in (with_gradient, True):
        (row,) = random_gradients(params, 1)
        given = [row[0], row[1] if used else None]
        train(optimizer, [given])
        train(plain, [given])
    for param, twin in zip(params, twins, strict=True):
        assert optimizer.state[param]["remainder"].dtype == other
        weight = optimizer.effective_weight(param)
        close = torch.isclose(weight, twin, rtol=0, atol=2.0**-40 if other == FP16 else 0.0)
        assert close.all()


def test_a_checkpoint_of_the_other_16_bit_type_leaves_no_remainder(seed: int) -> None:
    theirs = [parameter(8, 6, dtype=FP16)]
    saved = FusedLayca(theirs, 0.01, backend="torch")
    train(saved, random_gradients(theirs, 2))
    ours = FusedLayca([Parameter(theirs[0].detach().bfloat16())], 0.01, backend="torch")
    ours.load_state_dict(saved.state_dict())
    (param,) = params_of(ours)
    before = copy_of(param)
    assert same_bits(ours.effective_weight(param), before)
    ours.param_groups[0]["lr"] = 0.0
    train(ours, random_gradients([param], 1))
    assert ours.state[param]["remainder"].dtype == BF16
    assert same_bits(ours.effective_weight(param), before.float())


@every_half
@every_backend
def test_an_infinity_that_others_write_stops_its_layer(backend: str, dtype: torch.dtype, seed: int) -> None:
    """Whatever remainder it meets, with which bfloat16 would make the largest number of it. The other layer goes on."""
    param = parameter(2, 40, backend=backend, dtype=dtype)
    optimizer = FusedLayca([param], 0.01, chunks="all", backend=backend)
    train(optimizer, random_gradients([param], 1))
    rest = optimizer.state[param]["remainder"].view(torch.int16)
    for sign, (place, value) in enumerate(((int(rest[0].argmin()), "inf"), (int(rest[0].argmax()), "-inf"))):
        assert (rest[0, place] > 0) == bool(sign)
        param.data[0, place] = float(value)
    before, state = copy_of(param), copy_of(optimizer.state[param]["remainder"])
    train(optimizer, random_gradients([param], 2))
    assert same_bits(param[0].detach(), before[0])
    assert same_bits(optimizer.state[param]["remainder"][0], state[0])
    assert not same_bits(param[1].detach(), before[1])
    assert optimizer.rotation_stats()[param].broken.tolist() == [2, 0]
    assert optimizer.effective_weight(param)[0].isinf().sum() == 1 + (dtype == FP16)


BASES: dict[str, dict[str, Any]] = {"sgd": {}, "momentum": {"momentum": 0.9}, "adam": {"base": "adam"}}

#: Bytes that a step moves per parameter if it reads and writes everything once, with a 16-bit gradient: by base and
#: type of the moments, without remainders.
MOVED = {
    ("sgd", None): 6,
    ("sgd", BF16): 6,
    ("momentum", None): 14,
    ("momentum", BF16): 10,
    ("adam", None): 22,
    ("adam", BF16): 14,
}


def bytes_of_tensors() -> int:
    """Of all the tensors that Python knows."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if type(each) in (Tensor, Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("compensate", [None, False])
@pytest.mark.parametrize(("base", "state_dtype"), MOVED, ids=str)
@every_half
def test_bytes_kept_per_parameter(
    dtype: torch.dtype, base: str, state_dtype: torch.dtype | None, compensate: bool | None, seed: int
) -> None:
    param = Parameter(torch.randn(40, 50).to(dtype))
    options = {"state_dtype": state_dtype, "compensate": compensate, **BASES[base]}
    optimizer = FusedLayca([param], 0.05, backend="cpu", **options)
    train(optimizer, random_gradients([param], 2))
    sized = [value for value in optimizer.state[param].values() if value.shape == param.shape]
    kept = sum(value.untyped_storage().nbytes() for value in sized) / param.numel()
    moved = 2 * (param.element_size() + kept) + param.grad.element_size()
    assert moved == MOVED[base, state_dtype] + (4 if compensate is None else 0)


def test_nothing_but_the_state_grows_with_the_parameters(seed: int) -> None:
    """Of all tensors that the steps have left; tables take one row per tile of thousands of elements."""
    params = [Parameter(torch.randn(500, 1000).bfloat16())]
    rows = random_gradients(params, 2)
    params[0].grad = rows[0][0]
    before = bytes_of_tensors()
    optimizer = FusedLayca(params, 0.05, base="adam", backend="cpu")
    for (grad,) in rows:
        params[0].grad.copy_(grad)
        optimizer.step()
    assert bytes_of_tensors() - before == pytest.approx(5e6, rel=0.01)


@pytest.mark.parametrize("base", [{"momentum": 0.9}, {"base": "adam"}], ids=str)
@every_half
@every_backend
def test_replayed_steps_follow_a_schedule_as_eager_ones_do(
    backend: str, dtype: torch.dtype, base: Mapping[str, Any], capturing: Callable[[bool], None], seed: int
) -> None:
    """What a CUDA graph would repeat, on the device's tables alone; rates are tensors that a schedule fills."""
    params = [parameter(*shape, backend=backend, dtype=dtype) for shape in ((5, 4), (6,))]
    rate = torch.tensor(0.1, device=params[0].device)
    captured = FusedLayca(params, rate, backend=backend, capturable=True, **base)
    eager = FusedLayca(clones(params), 0.1, backend=backend, **base)
    schedules = [lr_scheduler.StepLR(each, 2, 0.3) for each in (captured, eager)]
    first, *rows = random_gradients(params, 4 if backend == "triton" else 12)
    train(captured, [first])
    train(eager, [first])
    replay = None
    for row in rows:
        for param, grad in zip(params, row, strict=True):
            param.grad.copy_(grad)
        replay = replay or record(captured, capturing)
        if row is not rows[0]:
            replay()
        train(eager, [row])
        # Rates in float32 are not those of the eager run to the last bit.
        for param, twin in zip(params, params_of(eager), strict=True):
            assert relative_distance(captured.effective_weight(param), eager.effective_weight(twin)) <= 1e-6
        for schedule in schedules:
            schedule.step()
    assert float(rate) < 0.1


@pytest.mark.parametrize("base", BASE_OPTIONS, ids=str)
def test_a_run_resumes_bit_for_bit_in_triton(base: Mapping[str, Any], seed: int) -> None:
    """Of tensors so small that every base has its turn in the interpreter, half of them in each type."""
    dtype = HALVES[BASE_OPTIONS.index(base) % 2]
    ours = FusedLayca([parameter(4, 3, backend="triton", dtype=dtype)], 0.02, backend="triton", **base)
    rows = random_gradients(params_of(ours), 2)
    train(ours, rows[:1])
    loaded = FusedLayca(clones(params_of(ours)), 0.5, backend="triton", **base)
    loaded.load_state_dict(through_file(ours))
    saved = contents(ours)
    for optimizer in (ours, loaded):
        train(optimizer, rows[1:])
    assert same_bits(contents(loaded), contents(ours))
    assert not same_bits(contents(ours)[0][2], saved[0][2])
