"""The code of the CUDA kernels, and the backend around it, on the host: everything but the GPU itself.

The emulator runs what one thread of a kernel runs, thread after thread; it refuses vectors at addresses that no GPU
would take. tests/gpu repeats this on a GPU where there is one.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layca_fast import FusedLayca
from layca_fast.backends import load
from layca_fast.backends.cuda import BACKEND
from layca_fast.commands.cases import BASE_OPTIONS, Case
from layca_fast.commands.verify import compare
from layca_fast.formulas.bases import FORMULAS
from layca_fast.formulas.tables import Column, Count, Hyper, Tile
from layca_fast.state.slot import Slot
from layca_fast.step.batch import Batch

from ...step import test_unscaling
from ...support import (
    clones,
    parameter,
    random_gradients,
    relative_distance,
    rows_by_formula,
    same_bits,
    shapes_for,
    train,
)
from ..test_equivalence import LARGE, cases
from .support import emulated, emulator  # noqa: F401

#: It takes minutes to build, and who has no GPU does not run this backend; where there is one, tests/gpu does.
pytestmark = pytest.mark.exhaustive

CPU = torch.device("cpu")
ROWS = rows_by_formula(lr=0.05, weight_decay=0.05)
every_formula = pytest.mark.parametrize("formula", FORMULAS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def batch_of(
    formula: str, params: list[Tensor], grads: list[Tensor | None], states: list[tuple[Tensor, ...]], layers: int = 1
) -> Batch:
    """A batch on these very tensors, ready for its first step; vectors do not rotate."""
    (base, group), row = ROWS[formula], FORMULAS[formula]
    slots = []
    for i, (param, state) in enumerate(zip(params, states, strict=True)):
        radius = torch.zeros(layers, dtype=torch.float64) if param.dim() > 1 else None
        step = torch.zeros(()) if row.counts_steps else None
        slots.append(Slot(param, group, base, str(i), state, step, radius, layers, dense=True, fresh=False))
    batch = Batch(row, slots, BACKEND.tile)
    batch.grads = list(grads)
    batch.refresh()
    return batch


def random_batch(formula: str, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Batch:
    params = [torch.randn(shape, dtype=dtype) for shape in shapes]
    # A mean square is more than the square of a mean, and their difference is to lose no digits.
    smallest = {"square_avg": 1.0, "exp_avg_sq": 1.0, "max_exp_avg_sq": 1.0}
    starts = [smallest.get(name, 0.0) for name in FORMULAS[formula].states]
    states = [tuple(start + 0.1 * torch.rand_like(param) for start in starts) for param in params]
    return batch_of(formula, params, [torch.randn_like(param) for param in params], states)


def twin(batch: Batch, move: Callable[[Tensor], Tensor] = Tensor.clone) -> Batch:
    """The same batch on copies of all tensors, made by ``move``."""
    states = [tuple(move(state) for state in slot.states) for slot in batch.slots]
    grads = [None if grad is None else move(grad) for grad in batch.grads]
    return batch_of(batch.formula.name, [move(param) for param in batch.params], grads, states)


def results(batch: Batch) -> list[object]:
    radii = [slot.radius for slot in batch.slots]
    return [batch.params, batch.states, radii, batch.dots, batch.coefficients, batch.counts]


@pytest.mark.filterwarnings("ignore:weight_decay=.* is ignored")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_follows_the_reference(case: Case, seed: int) -> None:
    errors = compare(replace(case, steps=5), "cuda", CPU, seed)
    assert errors.passed, errors


@pytest.mark.parametrize("case", [case for case in LARGE if case.dtype == torch.float32], ids=lambda case: case.name)
def test_follows_the_reference_at_size(case: Case, seed: int) -> None:
    errors = compare(replace(case, steps=min(case.steps, 2)), "cuda", CPU, seed)
    assert errors.passed, errors


@pytest.mark.parametrize("sine", [0.5, 0.1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("n", [100, 1000, 30_010])
def test_nearly_parallel_steps_turn_by_the_right_angle(n: int, sine: float, seed: int) -> None:
    errors = compare(Case(f"sin = {sine}", ((n // 10, 10),), steps=3, lr=0.05, sine=sine), "cuda", CPU, seed)
    assert errors.passed, errors


@pytest.mark.parametrize("options", BASE_OPTIONS, ids=str)
def test_equals_the_cpu_backend_after_50_steps(options: dict[str, object], seed: int) -> None:
    ours = [parameter(*shape) for shape in shapes_for(options, ((70, 90), (33,), (3, 5, 7)))]
    theirs = clones(ours)
    grads = random_gradients(ours, 50)
    optimizers = [
        FusedLayca(params, 0.03, backend=backend, **options) for params, backend in ((ours, "cuda"), (theirs, "cpu"))
    ]
    for optimizer in optimizers:
        train(optimizer, grads)
    for one, other in zip(ours, theirs, strict=True):
        assert relative_distance(one, other) <= 2e-6
        for name, value in optimizers[1].state[other].items():
            assert relative_distance(optimizers[0].state[one][name], value) <= 2e-6, name


@pytest.mark.parametrize(
    "options", [{"joins_at": 1.0, "chunks": "all"}, {"joins_at": 2.0, "radius": "current"}, {"radius": 2.5}], ids=str
)
def test_reaches_radii_and_joins_as_the_cpu_backend(options: dict[str, Any], seed: int) -> None:
    start = torch.randn(6, 90) if options.get("radius") == 2.5 else torch.zeros(6, 90)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [
        FusedLayca([param], 0.01, momentum=0.9, backend=name, **options)
        for param, name in ((ours, "cuda"), (theirs, "cpu"))
    ]
    for row in random_gradients([ours], 20):
        for optimizer in optimizers:
            train(optimizer, [row])
        assert relative_distance(ours, theirs) <= 2e-6
        radii = [optimizers[0].state[ours]["radius"], optimizers[1].state[theirs]["radius"]]
        torch.testing.assert_close(*radii, rtol=2e-6, atol=0)
    assert bool((radii[0] > 0).all())


@every_formula
@every_dtype
def test_the_verbs_one_by_one_give_the_bits_of_a_step(formula: str, dtype: torch.dtype, seed: int) -> None:
    whole = random_batch(formula, [(3, 700), (40,), (BACKEND.tile, 3), (5, 5)], dtype)
    whole.grads[3] = None
    whole.refresh()
    before = whole.params[0].clone()
    split = twin(whole)
    BACKEND.step(whole)
    for verb in (BACKEND.measure, BACKEND.coefficients, BACKEND.rotate):
        verb(split)
    assert same_bits(results(whole), results(split))
    assert not same_bits(whole.params[0], before)


@pytest.mark.parametrize("size", [1, 3, 4, 1023, 1024, 1025, 4092, 4096, 4097, 8200])
@every_dtype
@every_formula
def test_addresses_and_lengths_change_no_bit_and_nothing_beside_them(
    formula: str, dtype: torch.dtype, size: int, seed: int
) -> None:
    """The same elements go to the same threads whether they are moved as vectors or one by one."""
    plain = random_batch(formula, [(size, 1)], dtype)
    moved = []
    for offset in range(4):
        rooms: list[Tensor] = []

        def move(tensor: Tensor, offset: int = offset, rooms: list[Tensor] = rooms) -> Tensor:
            rooms.append(torch.full((size + 8,), 12345.0, dtype=dtype))
            return rooms[-1][offset : offset + size].view(tensor.shape).copy_(tensor)

        moved.append((offset, twin(plain, move), rooms))
    BACKEND.step(plain)
    for offset, batch, rooms in moved:
        BACKEND.step(batch)
        assert same_bits(results(batch), results(plain))
        for room in rooms:
            assert (room[:offset] == 12345.0).all()
            assert (room[offset + size :] == 12345.0).all()


@every_formula
def test_only_some_arrays_aligned(formula: str, seed: int) -> None:
    """A gradient that rotate does not read may lie anywhere; what it reads decides on its vectors."""
    plain = random_batch(formula, [(90, 90)])
    odd = twin(plain)
    room = torch.empty(8101)
    odd.grads = [room[1:].view(90, 90).copy_(plain.grads[0])]
    odd.refresh()
    for batch in (plain, odd):
        BACKEND.step(batch)
    assert same_bits(results(plain), results(odd))


def test_offsets_beyond_32_bits(seed: int) -> None:
    """Elements past a tensor's 2**31st: addresses and offsets are shifted against one another."""
    far = random_batch("sgd_momentum", [(3, 4096)])
    near = twin(far)
    shift = 2**34 + 12
    far.tiles[:, Tile.OFFSET] += shift
    for column in (Column.PARAM, Column.GRAD, Column.STATE):
        far.tensors[:, column] -= shift * 4
    for batch in (far, near):
        BACKEND.step(batch)
    assert same_bits(results(far), results(near))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@every_dtype
@every_formula
def test_elements_that_are_not_finite_count_once_as_zero(
    formula: str, dtype: torch.dtype, value: float, seed: int
) -> None:
    places = [0, 3, 4, 511, 4095, 4096, 12_010]
    broken = random_batch(formula, [(1, 12_011)], dtype)
    broken.grads[0].view(-1)[places] = 0.0
    clean = twin(broken)
    broken.grads[0].view(-1)[places] = value
    for batch in (broken, clean):
        BACKEND.step(batch)
    assert [int(batch.counts[0, Count.NON_FINITE]) for batch in (broken, clean)] == [len(places), 0]
    assert same_bits(results(broken)[:3], results(clean)[:3])


def test_what_is_not_finite_is_what_the_cpu_backend_takes_for_it(seed: int) -> None:
    """Squares that overflow included."""
    ours = random_batch("adam", [(40, 50)])
    ours.grads[0][3, 4:9] = torch.tensor([1e20, -1e25, 3e38, float("nan"), 1e18])
    theirs = twin(ours)
    BACKEND.step(ours)
    load("cpu").step(theirs)
    assert same_bits(ours.counts, theirs.counts)
    assert int(ours.counts[0, Count.NON_FINITE]) == 4


def test_finish_adds_up_more_tiles_than_a_block_has_threads(seed: int) -> None:
    batch = random_batch("sgd", [(1, 300 * BACKEND.tile + 5)])
    w, u = (each.double().view(-1) for each in (batch.params[0], batch.grads[0]))
    BACKEND.measure(batch)
    expected = torch.stack([(w * w).sum(), (w * u).sum(), (u * u).sum()])
    assert batch.n_tiles == 301
    torch.testing.assert_close(batch.dots[0], expected, rtol=1e-12, atol=1e-9)


def test_a_gradient_struck_from_the_table_skips_its_tensor(seed: int) -> None:
    """What unscaling in the step does on the device, where the host does not learn of it."""
    shapes: list[tuple[int, ...]] = [(40, 30), (7,), (3, 5)]
    batch = random_batch("adam", shapes)
    before = twin(batch)
    full = twin(batch)
    batch.tensors[1, Column.GRAD] = 0
    for each in (batch, full):
        BACKEND.step(each)
    for index in range(3):
        expected = before if index == 1 else full
        assert same_bits(batch.params[index], expected.params[index])
        assert same_bits(batch.slots[index].states, expected.slots[index].states)
        assert same_bits(batch.slots[index].step, expected.slots[index].step)
    assert not same_bits(full.params[1], before.params[1])


@every_formula
def test_the_scale_of_gradients_is_read_at_each_step(formula: str, seed: int) -> None:
    """By powers of two, which change no digit."""
    scaled = random_batch(formula, [(40, 30), (7,)])
    plain = twin(scaled)
    for factor in (0.25, 8.0):
        for ours, theirs in zip(scaled.grads, plain.grads, strict=True):
            assert theirs is not None
            assert ours is not None
            ours.copy_(theirs / factor)
        scaled.hypers[:, Hyper.GRAD_SCALE] = factor
        for batch in (scaled, plain):
            BACKEND.step(batch)
        assert same_bits(results(scaled), results(plain))


@test_unscaling.every_option
@pytest.mark.parametrize("unscaled", [False, True], ids=["unscaled in the step", "after unscale_()"])
def test_unscaling_in_the_step(options: dict[str, Any], unscaled: bool, seed: int) -> None:
    test_unscaling.test_the_standard_paths_bits("cuda", options, unscaled, seed)


def test_a_skipped_step_leaves_everything_as_it_was(seed: int) -> None:
    test_unscaling.test_a_skipped_step_leaves_everything_as_it_was("cuda", seed)
