"""16-bit parameters in the CUDA kernels, run by the emulator: every combination of types that these tell apart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from layca_fast import FusedLayca
from layca_fast.backends import load
from layca_fast.backends.cuda import BACKEND
from layca_fast.formulas.bases import FORMULAS
from layca_fast.formulas.rotation import LINEAR
from layca_fast.formulas.tables import Coefficient, Count
from layca_fast.state.compensation import HALVES, join, split
from layca_fast.state.slot import Slot
from layca_fast.step.batch import Batch

from ...optimizer import test_half_training
from ...optimizer.test_half_training import BF16, F32, GRADIENTS, every_base, every_half, groups_of, weights_of
from ...state import test_halves as test_half_state
from ...step import test_half_plans, test_unscaling
from ...support import copy_of, params_of, random_gradients, relative_distance, rows_by_formula, same_bits, train
from .support import emulated, emulator  # noqa: F401

#: It takes minutes to build, and who has no GPU does not run this backend; where there is one, tests/gpu does.
pytestmark = pytest.mark.exhaustive

ROWS = rows_by_formula(lr=0.05, weight_decay=0.05)
every_formula = pytest.mark.parametrize("formula", FORMULAS)

#: A mean square is more than the square of a mean, and their difference is to lose no digits.
SMALLEST = {"square_avg": 1.0, "exp_avg_sq": 1.0, "max_exp_avg_sq": 1.0}


@dataclass(frozen=True)
class Kinds:
    """What memory holds of a 16-bit parameter."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    compensated: bool


KINDS = [
    Kinds(param, grad, state, compensated)
    for param in HALVES
    for grad in (param, F32)
    for state in (F32, BF16)
    for compensated in (True, False)
]
every_kind = pytest.mark.parametrize("kinds", KINDS, ids=str)


def batch_of(
    formula: str, kinds: Kinds, param: Tensor, remainder: Tensor, grad: Tensor, states: tuple[Tensor, ...]
) -> Batch:
    """A batch on these very tensors, ready for its first step."""
    (base, group), row = ROWS[formula], FORMULAS[formula]
    radius = torch.zeros(1, dtype=torch.float64)
    step = torch.zeros(()) if row.counts_steps else None
    rest = remainder if kinds.compensated else None
    slot = Slot(param, group, base, "it", states, step, radius, 1, dense=True, fresh=False, remainder=rest)
    batch = Batch(row, [slot], BACKEND.tile)
    batch.grads, batch.grad_dtype = [grad], kinds.grad
    batch.refresh()
    return batch


def random_batch(formula: str, kinds: Kinds, *shape: int) -> Batch:
    param, remainder = split(torch.randn(shape), kinds.param)
    starts = [SMALLEST.get(name, 0.0) for name in FORMULAS[formula].states]
    states = tuple((start + 0.1 * torch.rand(shape)).to(kinds.state) for start in starts)
    return batch_of(formula, kinds, param, remainder, torch.randn(shape).to(kinds.grad), states)


def twin(batch: Batch, kinds: Kinds, move: Callable[[Tensor], Tensor] = Tensor.clone) -> Batch:
    """The same batch on copies of all tensors, made by ``move``."""
    (slot,), (grad,) = batch.slots, batch.grads
    assert grad is not None
    rest = torch.zeros_like(slot.param) if slot.remainder is None else move(slot.remainder)
    states = tuple(move(state) for state in slot.states)
    return batch_of(batch.formula.name, kinds, move(slot.param), rest, move(grad), states)


def results(batch: Batch) -> list[object]:
    (slot,) = batch.slots
    rest = slot.param if slot.remainder is None else slot.remainder
    return [slot.param, rest, slot.states, slot.radius, batch.dots, batch.coefficients, batch.counts]


@every_kind
@every_formula
def test_addresses_and_lengths_change_no_bit_and_nothing_beside_them(formula: str, kinds: Kinds, seed: int) -> None:
    for size in (1, 3, 1025, 4097):
        plain = random_batch(formula, kinds, size, 1)
        before = plain.params[0].clone()
        moved = []
        for offset in range(4):
            rooms: list[Tensor] = []

            def move(tensor: Tensor, offset: int = offset, size: int = size, rooms: list[Tensor] = rooms) -> Tensor:
                rooms.append(torch.full((size + 8,), 123.0, dtype=tensor.dtype))
                return rooms[-1][offset : offset + size].view(tensor.shape).copy_(tensor)

            moved.append((offset, twin(plain, kinds, move), rooms))
        BACKEND.step(plain)
        assert size == 1 or not same_bits(plain.params[0], before) or not kinds.compensated
        for offset, batch, rooms in moved:
            BACKEND.step(batch)
            assert same_bits(results(batch), results(plain))
            for room in rooms:
                assert (room[:offset] == 123.0).all()
                assert (room[offset + size :] == 123.0).all()


@every_kind
@every_formula
def test_states_are_those_of_the_cpu_backend_bit_for_bit(formula: str, kinds: Kinds, seed: int) -> None:
    """And the weights, which CUDA makes with fewer roundings, to those. Elements that are not finite included."""
    ours = random_batch(formula, kinds, 70, 61)
    assert ours.grads[0] is not None
    ours.grads[0].view(-1)[[0, 3, 1027, 4096]] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]).to(
        kinds.grad
    )
    theirs = twin(ours, kinds)
    for _ in range(3):
        BACKEND.step(ours)
        load("cpu").step(theirs)
    assert same_bits(ours.states, theirs.states)
    assert same_bits(ours.counts, theirs.counts)
    assert int(ours.counts[0, Count.NON_FINITE]) == 9
    pairs = [(batch.params[0], batch.slots[0].remainder) for batch in (ours, theirs)]
    weights = [param.float() if rest is None else join(param, rest) for param, rest in pairs]
    # A last bit of float32 may tip the rounding to 16 bits over.
    assert relative_distance(*weights) <= (2e-6 if kinds.compensated else torch.finfo(kinds.param).eps / 10)


@pytest.mark.parametrize("compensated", [True, False])
@every_half
def test_every_16_bit_number_is_read_and_written_as_in_python(dtype: torch.dtype, compensated: bool, seed: int) -> None:
    """Coefficients set by hand: what rotate makes of the weights alone shows how it takes them."""
    kinds = Kinds(dtype, F32, F32, compensated)
    param = torch.arange(2**16).to(torch.int16).view(dtype).view(256, 256)
    remainder = torch.randint(-(2**15), 2**15, param.shape).to(torch.int16).view(dtype)
    for factor in (1.0, 0.75, -3.0, 1e-3, 2.0**-14):
        batch = batch_of("sgd", kinds, param.clone(), remainder.clone(), torch.ones(256, 256), ())
        row = torch.zeros(Coefficient.WIDTH, dtype=torch.float64)
        # Minus zero, that a product with it changes no zero's sign.
        row[Coefficient.A], row[Coefficient.B], row[Coefficient.MODE] = factor, -0.0, LINEAR
        batch.coefficients[0] = row
        BACKEND.rotate(batch)
        weight = (join(param, remainder) if compensated else param.float()) * torch.tensor(factor)
        expected = split(weight, dtype) if compensated else (weight.to(dtype), remainder)
        (slot,) = batch.slots
        # CPUs differ in what they make of denormal float32 numbers, which the kernels neither need nor make.
        there = (weight.abs() >= 2.0**-126) | (weight == 0)
        number = there & ~weight.isnan()
        assert same_bits(slot.param[number], expected[0][number])
        assert slot.param[weight.isnan()].isnan().all()
        if compensated:
            assert slot.remainder is not None
            assert same_bits(slot.remainder[number], expected[1][number])


@every_base
def test_bfloat16_follows_float32_bit_for_bit(base: Mapping[str, Any], seed: int) -> None:
    test_half_training.test_bfloat16_follows_float32_bit_for_bit("cuda", base, seed)


@every_base
def test_float16_follows_float32(base: Mapping[str, Any], seed: int) -> None:
    test_half_training.test_float16_follows_float32("cuda", base, seed)


@every_base
def test_moments_are_rounded_before_the_step_is_made_of_them(base: Mapping[str, Any], seed: int) -> None:
    test_half_state.test_moments_of_16_bits_are_rounded_before_the_step_is_made_of_them("cuda", base, seed)


@pytest.mark.parametrize("types", GRADIENTS.values(), ids=GRADIENTS.keys())
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_gradients_of_any_type(dtype: torch.dtype, types: Any, seed: int) -> None:
    test_half_training.test_gradients_of_any_type("cuda", dtype, types, seed)


@every_half
def test_without_compensation_a_parameter_is_rounded_to_even(dtype: torch.dtype, seed: int) -> None:
    test_half_training.test_without_compensation_a_parameter_is_rounded_to_even("cuda", dtype, seed)


def test_layers_of_weights_that_are_not_finite_keep_every_bit(seed: int) -> None:
    test_half_training.test_layers_of_weights_that_are_not_finite_keep_every_bit("cuda", seed)


@every_half
def test_an_infinity_that_others_write_stops_its_layer(dtype: torch.dtype, seed: int) -> None:
    test_half_plans.test_an_infinity_that_others_write_stops_its_layer("cuda", dtype, seed)


@pytest.mark.parametrize(("exponent", "dtype"), test_unscaling.EDGES, ids=str)
def test_scales_at_the_edges_of_float32(exponent: float, dtype: torch.dtype, seed: int) -> None:
    test_unscaling.test_scales_at_the_edges_of_float32("cuda", exponent, dtype, seed)


@pytest.mark.parametrize("lr", [1e-2, 1e-4])
@every_half
def test_weights_turn_by_what_is_asked(dtype: torch.dtype, lr: float, seed: int) -> None:
    test_half_training.test_weights_turn_by_what_is_asked("cuda", dtype, lr, seed)


@every_half
@every_base
def test_equals_the_cpu_backend_after_50_steps(base: Mapping[str, Any], dtype: torch.dtype, seed: int) -> None:
    """Both rules, both radii, chunks, plain tensors with weight decay."""
    shapes = test_half_training.SHAPES[:3] if base["base"] == "muon" else test_half_training.SHAPES
    start = [torch.randn(shape).to(dtype) for shape in shapes]
    both = [
        FusedLayca(groups_of([torch.nn.Parameter(each) for each in copy_of(start)], base), 0.03, backend=backend)
        for backend in ("cuda", "cpu")
    ]
    grads = random_gradients(params_of(both[0]), 50)
    for optimizer in both:
        train(optimizer, grads)
    for ours, theirs in zip(*map(weights_of, both), strict=True):
        assert relative_distance(ours, theirs) <= 2e-6
