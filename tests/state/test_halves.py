"""What 16-bit parameters keep: the types of their moments, their remainders, through files, casts and other hands."""

import copy
import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from layca_fast import FusedLayca, layer_groups
from layca_fast.commands.cases import BASE_OPTIONS
from layca_fast.formulas.bases import BASES
from layca_fast.state.compensation import HALVES, join

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
    shapes_for,
    train,
)

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
every_base = pytest.mark.parametrize("base", BASE_OPTIONS, ids=str)


def half_optimizer(backend: str, dtype: torch.dtype, **options: Any) -> FusedLayca:
    shapes = shapes_for(options, ((6, 5), (7,), (4, 3, 2)))
    params = [parameter(*shape, backend=backend, dtype=dtype) for shape in shapes]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "rotate": False, "weight_decay": 0.05},
        {"params": params[2:], "chunks": 2},
    ]
    return FusedLayca(groups, 0.02, backend=backend, **options)


@pytest.mark.parametrize(("given", "kept"), [(None, F32), (F32, F32), (BF16, BF16)], ids=str)
@every_half
@every_backend
def test_types_of_the_state(
    backend: str, dtype: torch.dtype, given: torch.dtype | None, kept: torch.dtype, seed: int
) -> None:
    optimizer = half_optimizer(backend, dtype, base="adam", amsgrad=True, state_dtype=given)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    for param in params_of(optimizer):
        types = {name: value.dtype for name, value in optimizer.state[param].items()}
        expected = {"exp_avg": kept, "exp_avg_sq": kept, "max_exp_avg_sq": kept, "step": F32, "remainder": dtype}
        assert types == {**expected, **({"radius": torch.float64} if param.dim() > 1 else {})}
        assert all(optimizer.state[param][name].shape == param.shape for name in ("exp_avg", "remainder"))


@pytest.mark.parametrize("dtype", [F32, torch.float64], ids=str)
@native_backends
def test_state_dtype_concerns_16_bit_parameters_only(backend: str, dtype: torch.dtype, seed: int) -> None:
    optimizer = half_optimizer(backend, dtype, momentum=0.9, state_dtype=BF16, compensate=True)
    plain = FusedLayca(clones(params_of(optimizer)), 0.02, momentum=0.9, backend=backend)
    grads = random_gradients(params_of(optimizer), 2)
    train(optimizer, grads)
    train(plain, grads)
    assert same_bits(contents(optimizer)[0], contents(plain)[0])


@every_base
@every_backend
def test_moments_of_16_bits_are_rounded_before_the_step_is_made_of_them(
    backend: str, base: Mapping[str, Any], seed: int
) -> None:
    """So the weights follow a float32 run whose gradients are the steps that the rounded moments make."""
    param = parameter(23, 29, backend=backend, dtype=BF16)
    ours = FusedLayca([param], 0.02, backend=backend, state_dtype=BF16, **base)
    theirs = FusedLayca([Parameter(param.detach().float())], 0.02, backend=backend)
    (group,), row = ours.param_groups, BASES[base["base"]]
    formula = row.formula(group)
    starts = [group[row.starts[name]] if name in row.starts else 0.0 for name in formula.states]
    states = tuple(torch.full(param.shape, start, device=param.device).bfloat16().float() for start in starts)
    for count in range(1, 4):
        grad = torch.randn(param.shape).to(param.device).bfloat16()
        options = formula.prepare(torch.tensor(float(count)).double(), row.scalars(group, count == 1))
        states = formula.advance(grad.float(), states, options)
        states = tuple(state.bfloat16().float() for state in states)
        train(ours, [[grad]])
        for name, state in zip(formula.states, states, strict=True):
            # A last bit of float32 may tip the rounding to 8 bits over.
            assert relative_distance(ours.state[param][name], state) <= 1e-4
        # From now on exactly what is there.
        states = tuple(ours.state[param][name].float() for name in formula.states)
        step = formula.step(grad.float(), states, options)
        if formula.direct is not None:
            direction = formula.direct(group, BF16, param.device)
            matrix = step.to(direction.dtype).unsqueeze(0)
            room = matrix.new_empty(direction.room(1, *step.shape))
            step = direction.run(matrix, step.double().norm().view(1), room)[0].float()
        train(theirs, [[step]])
        assert relative_distance(ours.effective_weight(param), params_of(theirs)[0]) <= 2e-7


def through_file(optimizer: FusedLayca) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("state_dtype", [None, BF16], ids=str)
@every_half
@every_base
@native_backends
def test_a_run_resumes_bit_for_bit(
    backend: str, base: Mapping[str, Any], dtype: torch.dtype, state_dtype: torch.dtype | None, seed: int
) -> None:
    check_resuming(backend, base, dtype, state_dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_run_resumes_bit_for_bit_in_triton(dtype: torch.dtype, seed: int) -> None:
    check_resuming("triton", {"base": "adam"}, dtype, BF16)


def check_resuming(backend: str, base: Mapping[str, Any], dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    """Nothing of the state is cast, though torch would make everything the parameter's type."""
    ours = half_optimizer(backend, dtype, **base, state_dtype=state_dtype)
    grads = random_gradients(params_of(ours), 4)
    train(ours, grads[:2])
    options = {"backend": backend, **base}
    loaded = FusedLayca([{"params": [param]} for param in clones(params_of(ours))], 0.5, **options)
    loaded.load_state_dict(through_file(ours))
    saved = contents(ours)
    assert same_bits([state for *_, state in contents(loaded)], [state for *_, state in saved])
    train(ours, grads[2:])
    train(loaded, grads[2:])
    assert same_bits(contents(loaded), contents(ours))
    assert not same_bits(contents(ours), saved)


@every_half
@every_backend
def test_a_run_moves_between_backends(backend: str, dtype: torch.dtype, seed: int) -> None:
    ours = half_optimizer(backend, dtype, momentum=0.9)
    theirs = half_optimizer("torch", dtype, momentum=0.9)
    grads = random_gradients(params_of(ours), 4)
    with torch.no_grad():
        for param, other in zip(params_of(ours), params_of(theirs), strict=True):
            other.copy_(param)
    train(ours, grads[:2])
    for group in ours.param_groups:
        group["backend"] = "torch"
    train(ours, grads[2:])
    train(theirs, grads)
    for param, other in zip(params_of(ours), params_of(theirs), strict=True):
        assert relative_distance(ours.effective_weight(param), theirs.effective_weight(other)) <= 1e-6


def test_a_remainder_that_was_cast_is_refused(seed: int) -> None:
    cast = F32
    optimizer = half_optimizer("torch", BF16)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "remainder": saved["state"][0]["remainder"].to(cast)}
    before = contents(optimizer)
    with pytest.raises(ValueError, match=rf"'remainder' has dtype {cast} for parameter 0 of group 0.*raw bits"):
        optimizer.load_state_dict(saved)
    assert same_bits(contents(optimizer), before)
    first = params_of(optimizer)[0]
    kept = optimizer.state[first]["remainder"]
    optimizer.state[first]["remainder"] = kept.to(cast)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=rf"'remainder' of parameter 0 of group 0 .*has dtype {cast}.*drop it"):
        optimizer.step()
    assert same_bits(contents(optimizer), before)
    del optimizer.state[first]["remainder"]
    optimizer.step()
    assert optimizer.state[first]["remainder"].dtype == BF16


@every_half
@every_backend
def test_what_others_write_to_a_parameter_counts_within_half_an_ulp(
    backend: str, dtype: torch.dtype, seed: int
) -> None:
    """Pruned weights stay as good as zero, whatever remainder they had; dropping it makes the rest exact."""
    param = parameter(40, 30, backend=backend, dtype=dtype)
    optimizer = FusedLayca([param], 0.01, backend=backend)
    train(optimizer, random_gradients([param], 2))
    mask = torch.rand(param.shape).to(param.device) < 0.5
    new = torch.where(mask, 0.0, torch.randn(param.shape).to(param.device)).to(dtype)
    param.data.copy_(new)
    weight = optimizer.effective_weight(param)
    assert ((weight - new.float()).abs() <= torch.finfo(dtype).eps / 2 * new.float().abs() + 2.0**-25).all()
    del optimizer.state[param]["remainder"]
    twin = FusedLayca(float_params := [Parameter(new.float())], 0.01, backend=backend)
    twin.state[float_params[0]]["radius"] = optimizer.state[param]["radius"].clone()
    grads = random_gradients([param], 2)
    train(optimizer, grads)
    train(twin, [[grad.float() for grad in row] for row in grads])
    assert relative_distance(optimizer.effective_weight(param), float_params[0]) <= 1e-7


@every_backend
def test_zeros_with_remainders_do_no_harm(backend: str, seed: int) -> None:
    """In raw bits a zero with a negative remainder would be NaN, and stop its layer for good."""
    param = parameter(40, 30, backend=backend, dtype=BF16)
    optimizer = FusedLayca([param], 0.01, backend=backend)
    train(optimizer, random_gradients([param], 2))
    pruned = torch.rand(param.shape).to(param.device) < 0.5
    assert (optimizer.state[param]["remainder"].view(torch.int16)[pruned] < 0).any()
    param.data.masked_fill_(pruned, -0.0)
    before = copy_of(param)
    train(optimizer, random_gradients([param], 1))
    assert optimizer.effective_weight(param).isfinite().all()
    assert not same_bits(copy_of(param), before)
    assert optimizer.rotation_stats()[param].broken.tolist() == [0]


@native_backends
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_a_layer_that_was_set_to_zero_stays_there(backend: str, dtype: torch.dtype, seed: int) -> None:
    """What is left of it, remainders or denormal numbers, is nothing to scale up to the old radius."""
    param = parameter(40, 30, backend=backend, dtype=dtype)
    optimizer = FusedLayca([param], 0.01, chunks="all", backend=backend)
    train(optimizer, random_gradients([param], 2))
    param.data[:20] *= 0 if dtype == BF16 else 1e-40
    before = param[:20].detach().clone()
    train(optimizer, random_gradients([param], 2))
    assert torch.equal(param[:20], before) or not param[:20].any()
    assert param.isfinite().all()
    assert param[20:].any(1).all()


@every_half
@native_backends
def test_a_module_is_cast_mid_run(backend: str, dtype: torch.dtype, seed: int) -> None:
    """To 16 bits and back: moments stay as they are, and no remainder outlives the type that it completes."""
    module = nn.Linear(7, 5)
    optimizer = FusedLayca(module.parameters(), 0.02, momentum=0.9, backend=backend)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    buffers = [optimizer.state[param]["momentum_buffer"] for param in params_of(optimizer)]
    module.to(dtype)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    for param, buffer in zip(params_of(optimizer), buffers, strict=True):
        assert optimizer.state[param]["momentum_buffer"] is buffer
        assert optimizer.state[param]["remainder"].view(torch.int16).any()
    module.float()
    assert same_bits(optimizer.effective_weight(module.weight), module.weight.detach())
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert not any("remainder" in optimizer.state[param] for param in params_of(optimizer))


@native_backends
def test_switching_compensation_mid_run(backend: str, seed: int) -> None:
    optimizer = half_optimizer(backend, BF16)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    for flag in (False, None):
        for group in optimizer.param_groups:
            group["compensate"] = flag
        train(optimizer, random_gradients(params_of(optimizer), 1))
        assert [("remainder" in optimizer.state[param]) for param in params_of(optimizer)] == [flag is None] * 3


@native_backends
def test_a_float16_weight_beyond_its_range_becomes_infinite(backend: str, seed: int) -> None:
    """As in any float16 training; the others go on."""
    param = Parameter(torch.tensor([65000.0, 1.0, -65000.0]).half())
    optimizer = FusedLayca([param], 1000.0, backend=backend)
    train(optimizer, [[torch.tensor([-1.0, 1e-3, 1.0]).half()]] * 2)
    assert param.tolist()[::2] == [float("inf"), float("-inf")]
    assert same_bits(optimizer.effective_weight(param)[::2], param.detach().float()[::2])
    assert float(optimizer.effective_weight(param)[1]) == pytest.approx(-1.0, abs=2e-3)


@native_backends
def test_a_foreign_checkpoint_in_16_bits(backend: str, seed: int) -> None:
    """torch keeps the moments of a bfloat16 parameter in bfloat16: they go on in float32, from the same numbers."""
    param = parameter(6, 5, dtype=BF16)
    plain = torch.optim.AdamW([param], 1e-3)
    train(plain, random_gradients([param], 2))
    moments = copy_of(plain.state[param]["exp_avg"])
    ours = FusedLayca(clones([param]), 0.01, base="adam", backend=backend)
    with pytest.warns(UserWarning, match="another optimizer"):
        ours.load_state_dict(plain.state_dict())
    state = ours.state[params_of(ours)[0]]
    assert same_bits(state["exp_avg"], moments)
    train(ours, random_gradients([param], 1))
    assert state["exp_avg"].dtype == F32
    assert state["remainder"].view(torch.int16).any()


@native_backends
def test_a_network_of_16_bits_with_layer_groups(backend: str, seed: int) -> None:
    """Forward and backward in bfloat16 train as in float32; what rotates keeps its norm and its remainder."""
    torch.manual_seed(seed)
    labels = torch.arange(64) % 4
    inputs = torch.randn(64, 8) + 3 * torch.eye(4, 8)[labels]
    plain = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4))
    losses = []
    for model in (plain, copy.deepcopy(plain).to(BF16)):
        optimizer = FusedLayca(layer_groups(model, lr=0.03), momentum=0.9, backend=backend)
        for _ in range(60):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs.to(model[0].weight.dtype)).float(), labels)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.7  # log(4) before training
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    for layer in (model[0], model[3]):
        state = optimizer.state[layer.weight]
        weight: Tensor = join(layer.weight.detach(), state["remainder"])
        assert float(weight.double().norm()) == pytest.approx(float(state["radius"]), rel=2e-7)
