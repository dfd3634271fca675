"""bfloat16 and float16 parameters under an attached optimizer: the steps of float32 ones, kept to the last bit."""

import math
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from layca_fast import FusedLayca, attach
from layca_fast.attach import exchange
from layca_fast.commands.verify import angle_between, layers_of
from layca_fast.formulas.options import RULES

from ..support import (
    clones,
    contents,
    copy_of,
    every_backend,
    norm_of,
    parameter,
    params_of,
    random_gradients,
    relative_distance,
    same_bits,
    train,
)
from .support import ALL_OPTIMIZERS, every_half, every_optimizer, new_params

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32


def rotating(optimizer: Optimizer) -> list[Tensor]:
    return [param for param in params_of(optimizer) if param.dim() > 1]


def float32_of(params: list[Any]) -> list[Parameter]:
    return [Parameter(param.detach().float()) for param in params]


def half_gradients(optimizer: Optimizer, steps: int) -> list[list[Tensor]]:
    return [
        [grad.to(params_of(optimizer)[0].dtype) for grad in row]
        for row in random_gradients(params_of(optimizer), steps)
    ]


@every_half
@every_optimizer
def test_it_is_the_run_of_float32_parameters(name: str, dtype: torch.dtype, seed: int) -> None:
    """Weights and states, on the same gradients: bfloat16 and its remainder are the float32 weight, bit for bit.

    float16 is that down to 2**-16. Below, a weight is off by 2**-40 at most, which may move a coefficient of its layer
    to the next float32: 2**-24 of the norm, once. What does not rotate takes the plain optimizer's step.
    """
    make = ALL_OPTIMIZERS[name]
    ours = make(new_params(name, dtype), lr=0.03)
    theirs, plain = make(float32_of(params_of(ours)), lr=0.03), make(clones(params_of(ours)), lr=0.03)
    handle = attach(ours)
    attach(theirs)
    gradients = half_gradients(ours, 6)
    for row in gradients:
        train(ours, [row])
        train(theirs, [[grad.float() for grad in row]])
        train(plain, [row])
        assert same_bits([param.grad for param in params_of(ours)], row), "gradients are read only"
    for param, expected, untouched in zip(params_of(ours), params_of(theirs), params_of(plain), strict=True):
        assert param.dtype == dtype
        if param.dim() < 2:
            assert same_bits(copy_of([param, ours.state[param]]), copy_of([untouched, plain.state[untouched]]))
            continue
        state = dict(ours.state[param])
        assert state.pop("remainder").dtype == dtype
        assert relative_distance(handle.effective_weight(param), expected) <= (0 if dtype == BF16 else 2.0**-24)
        if dtype == BF16:
            assert same_bits(state, dict(theirs.state[expected]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunks", [1, 3, "all"])
@every_half
@every_backend
def test_every_backend_turns_by_the_angle_and_keeps_the_norm(
    backend: str, dtype: torch.dtype, chunks: int | str, rule: str, seed: int
) -> None:
    """Of what lies in one run of memory, permuted, and strided: a step of 1e-3 is less than the type can tell apart."""
    params = [
        parameter(6, 50, backend=backend, dtype=dtype),
        Parameter(parameter(3, 3, 4, 5, backend=backend, dtype=dtype).detach().to(memory_format=torch.channels_last)),
        Parameter(parameter(9, 60, backend=backend, dtype=dtype).detach()[:, ::2]),
    ]
    optimizer = SGD([{"params": params[:1]}, {"params": params[1:], "backend": "auto"}], 1e-3)
    handle = attach(optimizer, rule, chunks=chunks, backend=backend)
    before = [layers_of(handle.effective_weight(param), chunks) for param in params]
    norms = [[float(layer.norm()) for layer in layers] for layers in before]
    for row in random_gradients(params, 3):
        train(optimizer, [row])
        after = [layers_of(handle.effective_weight(param), chunks) for param in params]
        for old, new, norm in zip(*(list(chain(*each)) for each in (before, after, norms)), strict=True):
            # Rounding to float32, of weights and their difference, tilts the step by 2**-24 / 1e-3 at most.
            assert rule == "hyperball" or angle_between(old, new) == pytest.approx(math.atan(1e-3), rel=1e-4)
            assert float(new.norm()) == pytest.approx(norm, rel=2e-7)
        before = after


@every_half
def test_attached_sgd_is_fused_layca(dtype: torch.dtype, seed: int) -> None:
    """As of float32: the difference of weights is off by 2**-24 of them, the step is 0.04 of them."""
    params = [parameter(*shape, dtype=dtype) for shape in ((6, 5), (9, 3, 2))]
    ours, fused = SGD(params, 0.04, momentum=0.9), FusedLayca(clones(params), 0.04, momentum=0.9)
    handle = attach(ours)
    gradients = random_gradients(params, 100)
    train(ours, gradients)
    train(fused, gradients)
    for a, b in zip(params, params_of(fused), strict=True):
        assert relative_distance(handle.effective_weight(a), fused.effective_weight(b)) <= 1e-6
        assert float(ours.state[a]["radius"]) == float(fused.state[b]["radius"])


@pytest.mark.parametrize("block", [1, 7, 64])
@every_half
def test_blocks_change_no_bit(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    params = [
        *(parameter(*shape, dtype=dtype) for shape in ((6, 5), (3, 4, 5), (2, 2), (4, 0))),
        Parameter(parameter(6, 5, dtype=dtype).detach().t()),
    ]
    optimizers = [AdamW(clones(params), 0.05), AdamW(params, 0.05)]
    gradients = half_gradients(optimizers[0], 3)
    for optimizer, number in zip(optimizers, (exchange.BLOCK_ON_CPU, block), strict=True):
        monkeypatch.setattr(exchange, "BLOCK_ON_CPU", number)
        attach(optimizer)
        train(optimizer, gradients)
    assert same_bits(contents(optimizers[0]), contents(optimizers[1]))


def test_gradients_may_be_missing_and_of_other_types(seed: int) -> None:
    """A missing one leaves every bit, and makes no state; one of float32 counts in full."""
    params = [parameter(6, 5, dtype=BF16), parameter(6, 5, dtype=BF16)]
    optimizer = AdamW(params, 0.03, weight_decay=0)
    twin = AdamW(float32_of(params), 0.03, weight_decay=0)
    handle = attach(optimizer)
    attach(twin)
    params[0].grad_dtype = None
    before = copy_of(params[1])
    for grad in torch.randn(3, 6, 5):
        params[0].grad = params_of(twin)[0].grad = grad
        optimizer.step()
        twin.step()
    assert torch.equal(handle.effective_weight(params[0]), params_of(twin)[0])
    assert same_bits(copy_of(params[1]), before)
    assert params[1] not in optimizer.state
    train(optimizer, [[None, torch.randn(6, 5)]])
    assert float(optimizer.state[params[1]]["step"]) == 1
    assert float(optimizer.state[params[0]]["step"]) == 3


def test_a_rate_of_zero_keeps_every_bit_and_makes_the_whole_state(seed: int) -> None:
    """torch.distributed.checkpoint loads only what is there after such a step."""
    optimizer = AdamW([parameter(6, 5, dtype=BF16)], 0.0)
    attach(optimizer)
    (param,) = params_of(optimizer)
    before = copy_of(param)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert same_bits(copy_of(param), before)
    assert {name: value.dtype for name, value in optimizer.state[param].items()} == {
        "step": F32,
        "exp_avg": F32,
        "exp_avg_sq": F32,
        "radius": torch.float64,
        "remainder": BF16,
    }
    assert not optimizer.state[param]["radius"].any()


@every_half
def test_what_others_write_counts_within_half_an_ulp(dtype: torch.dtype, seed: int) -> None:
    optimizer = SGD([parameter(40, 30, dtype=dtype)], 0.01)
    handle = attach(optimizer)
    (param,) = params_of(optimizer)
    train(optimizer, random_gradients([param], 2))
    new = torch.randn(40, 30).to(dtype)
    param.data.copy_(new)
    weight = handle.effective_weight(param)
    assert ((weight - new.float()).abs() <= torch.finfo(dtype).eps / 2 * new.float().abs() + 2.0**-25).all()
    del optimizer.state[param]["remainder"]
    assert same_bits(handle.effective_weight(param), new)
    twin = SGD(float32_of([param]), 0.01)
    attach(twin)
    twin.state[params_of(twin)[0]]["radius"] = optimizer.state[param]["radius"].clone()
    gradients = half_gradients(optimizer, 2)
    train(optimizer, gradients)
    train(twin, [[grad.float() for grad in row] for row in gradients])
    assert relative_distance(handle.effective_weight(param), params_of(twin)[0]) <= (0 if dtype == BF16 else 2.0**-24)


@every_half
def test_a_module_is_cast_mid_run(dtype: torch.dtype, seed: int) -> None:
    """To 16 bits and back: moments stay float32, and no remainder outlives the type that it completes."""
    module = nn.Linear(7, 5)
    optimizer = AdamW(module.parameters(), 0.02)
    handle = attach(optimizer, backend="torch")
    train(optimizer, random_gradients(params_of(optimizer), 2))
    moment = copy_of(optimizer.state[module.weight]["exp_avg"])
    module.weight.data = module.weight.data.to(dtype)
    assert same_bits(copy_of(optimizer.state[module.weight]["exp_avg"]), moment)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    assert optimizer.state[module.weight]["exp_avg"].dtype == F32
    assert optimizer.state[module.weight]["remainder"].view(torch.int16).any()
    before = layers_of(handle.effective_weight(module.weight), 1)[0]
    module.weight.data = handle.effective_weight(module.weight)
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert "remainder" not in optimizer.state[module.weight]
    assert angle_between(before, layers_of(module.weight, 1)[0]) == pytest.approx(math.atan(0.02), rel=1e-4)


def test_a_tensor_that_stops_to_rotate_takes_the_plain_optimizers_step(seed: int) -> None:
    optimizer = AdamW([parameter(6, 5, dtype=BF16)], 0.02)
    attach(optimizer)
    (param,) = params_of(optimizer)
    train(optimizer, random_gradients([param], 2))
    radius = copy_of(optimizer.state[param]["radius"])
    optimizer.param_groups[0]["rotate"] = False
    twin = AdamW(clones([param]), 0.02)
    state = {name: optimizer.state[param][name] for name in ("step", "exp_avg", "exp_avg_sq")}
    # As torch casts what it loads.
    twin.state[params_of(twin)[0]] = {
        name: value.clone() if name == "step" else value.to(BF16) for name, value in state.items()
    }
    gradients = half_gradients(optimizer, 3)
    train(optimizer, gradients)
    train(twin, gradients)
    assert same_bits(copy_of(param), copy_of(params_of(twin)[0]))
    assert same_bits(optimizer.state[param]["radius"], radius)
    assert "remainder" not in optimizer.state[param]
    del optimizer.param_groups[0]["rotate"]
    train(optimizer, half_gradients(optimizer, 1))
    assert norm_of(param) == pytest.approx(float(radius), rel=1e-2)
    assert optimizer.state[param]["exp_avg"].dtype == F32


def test_attaching_in_the_middle_of_a_run(seed: int) -> None:
    """The moments that a plain optimizer has of a 16-bit parameter go on in float32, from the same numbers."""
    optimizer = AdamW([parameter(6, 5, dtype=BF16)], 0.02)
    (param,) = params_of(optimizer)
    train(optimizer, random_gradients([param], 2))
    moment = copy_of(optimizer.state[param]["exp_avg"])
    attach(optimizer)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert moment.dtype == BF16
    assert torch.equal(optimizer.state[param]["exp_avg"], moment.float().lerp(torch.zeros(6, 5), 1 - 0.9))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_may_skip_a_step(fused: bool, seed: int) -> None:
    module = nn.Linear(6, 5, dtype=BF16)
    optimizer = AdamW(module.parameters(), lr=0.02, fused=fused)
    attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        optimizer.zero_grad()
        before = contents(optimizer)
        loss = module(torch.randn(8, 6, dtype=BF16)).float().square().mean()
        scaler.scale(loss * (math.inf if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same_bits(contents(optimizer)[0][0], before[0][0]) == (step == 1)


@every_half
def test_a_norm_that_other_code_changes_is_found(dtype: torch.dtype, seed: int) -> None:
    optimizer = SGD([("matrix", parameter(6, 50, dtype=dtype))], 0.02)
    handle = attach(optimizer)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    for at in ("step", "now"):
        name, drift = handle.check_norms(at=at).worst()
        assert name == "matrix"
        assert abs(drift) < 2e-7
    with torch.no_grad():
        params_of(optimizer)[0].mul_(0.5)
    assert handle.check_norms(at="now").worst()[1] == pytest.approx(-0.5, abs=1e-2)
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert handle.check_norms().worst()[1] == pytest.approx(-0.5, abs=1e-2)


@every_half
def test_a_layer_that_waits_takes_the_optimizers_own_steps_in_float32(dtype: torch.dtype, seed: int) -> None:
    """From zeros on, until its norm is what is asked."""
    params = [Parameter(torch.zeros(6, 5, dtype=dtype))]
    ours, theirs, plain = (AdamW(each, 0.02) for each in (params, float32_of(params), float32_of(params)))
    handle = attach(ours, joins_at=0.3)
    attach(theirs, joins_at=0.3)
    # Steps that point one way more than not, so that the norm is sure to grow.
    drift = 2 * torch.randn(6, 5).sign()
    for step in range(8):
        grad = (drift + torch.randn(6, 5)).to(dtype)
        train(ours, [[grad]])
        train(theirs, [[grad.float()]])
        train(plain, [[grad.float()]])
        if step < 2:
            assert relative_distance(handle.effective_weight(params[0]), params_of(plain)[0]) <= 2.0**-23
    assert float(ours.state[params[0]]["radius"]) >= 0.3
    assert relative_distance(handle.effective_weight(params[0]), params_of(theirs)[0]) <= (
        0 if dtype == BF16 else 2.0**-20
    )


@pytest.mark.parametrize("chunks", [(2, 1, 3), "matrices", "columns"], ids=str)
@every_half
@every_backend
def test_every_part_of_a_tensor_that_is_a_layer(backend: str, dtype: torch.dtype, chunks: Any, seed: int) -> None:
    """Remainders lie as the parts do, whatever a backend makes of them."""
    shape = (6, 4, 5) if chunks == "matrices" else (6, 20)
    params = [parameter(*shape, backend=backend, dtype=dtype)]
    ours, theirs = SGD(params, 0.03, momentum=0.9), SGD(float32_of(params), 0.03, momentum=0.9)
    handle = attach(ours, chunks=chunks)
    attach(theirs, chunks=chunks)
    for row in half_gradients(ours, 3):
        train(ours, [row])
        train(theirs, [[grad.float() for grad in row]])
    weight = handle.effective_weight(params[0])
    assert relative_distance(weight, params_of(theirs)[0]) <= (0 if dtype == BF16 else 2.0**-24)
    assert same_bits(ours.state[params[0]]["radius"], theirs.state[params_of(theirs)[0]]["radius"])
