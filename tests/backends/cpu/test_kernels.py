"""What is particular to the native CPU backend: threads, schedules, denormals, addresses, and each of its kernels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import Tensor

from layca_fast.backends import load
from layca_fast.formulas.bases import FORMULAS
from layca_fast.formulas.rotation import KEEP
from layca_fast.formulas.tables import Coefficient, Count
from layca_fast.state.slot import Slot
from layca_fast.step.batch import Batch

from ...support import rows_by_formula, same_bits

CPU = load("cpu")
INSTRUCTION_SETS = import_module("layca_fast._cpu").instruction_sets
LR = 0.05

#: Shapes that end in the middle of a lane, a block, a tile and a piece; the largest fits in no core's cache.
SHAPES = ((1,), (15,), (16, 1), (33,), (7, 73), (8, 513), (4097,), (3, 30_011), (650_021,), (64, 64), (5, 5))


ROWS = rows_by_formula(lr=LR)
every_formula = pytest.mark.parametrize("formula", sorted(FORMULAS))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


#: A mean square is more than the square of a mean, and their difference is to lose no digits.
SMALLEST = {"square_avg": 1.0, "exp_avg_sq": 1.0, "max_exp_avg_sq": 1.0}


def make_batch(formula: str, tensors: Sequence[Tensor], grads: Sequence[Tensor | None], *, layers: int = 1) -> Batch:
    """A batch ready to be stepped; states start as small random numbers, and vectors do not rotate."""
    (base, group), row = ROWS[formula], FORMULAS[formula]
    slots = [
        Slot(
            param=tensor,
            group=group,
            base=base,
            label="a tensor",
            states=tuple(SMALLEST.get(name, 0.0) + 0.1 * torch.rand_like(tensor) for name in row.states),
            step=torch.zeros(()) if row.counts_steps else None,
            radius=torch.zeros(layers, dtype=torch.float64) if tensor.dim() > 1 else None,
            layers=layers,
            dense=True,
            fresh=False,
        )
        for tensor in tensors
    ]
    batch = Batch(row, slots, CPU.tile)
    batch.grads = list(grads)
    batch.refresh()
    return batch


def results(batch: Batch) -> list[object]:
    """Everything that a step writes."""
    per_slot = [[slot.param, list(slot.states), slot.radius] for slot in batch.slots]
    return [per_slot, batch.dots, batch.coefficients, batch.counts]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_batch(formula: str, dtype: torch.dtype, seed: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> Batch:
    torch.manual_seed(seed)
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return make_batch(formula, tensors, [torch.randn_like(tensor) for tensor in tensors])


def test_the_rows_cover_every_formula() -> None:
    assert set(ROWS) == set(FORMULAS)


@every_dtype
@every_formula
def test_bits_depend_neither_on_threads_nor_on_the_schedule(
    formula: str, dtype: torch.dtype, seed: int, threads: None
) -> None:
    outcomes = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        fused, verbs = (random_batch(formula, dtype, seed) for _ in range(2))
        for _ in range(2):
            CPU.step(fused)
            CPU.measure(verbs)
            CPU.coefficients(verbs)
            CPU.rotate(verbs)
        outcomes += [results(fused), results(verbs)]
    assert not same_bits(outcomes[0][0], results(random_batch(formula, dtype, seed))[0])
    assert all(same_bits(outcomes[0], other) for other in outcomes[1:])


@every_dtype
@every_formula
def test_every_instruction_set_gives_the_same_bits(
    formula: str, dtype: torch.dtype, seed: int, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    assert INSTRUCTION_SETS[-1] == "baseline"
    outcomes = []
    for instructions in INSTRUCTION_SETS:
        monkeypatch.setattr(CPU, "instructions", instructions)
        batch = random_batch(formula, dtype, seed)
        CPU.step(batch)
        outcomes.append(results(batch))
    assert all(same_bits(outcomes[0], other) for other in outcomes[1:])


@every_formula
def test_bits_do_not_depend_on_the_rest_of_the_batch(formula: str, seed: int) -> None:
    together = random_batch(formula, torch.float32, seed)
    pairs = zip(together.slots, together.grads, strict=True)
    alone = [make_batch(formula, [slot.param.clone()], [grad]) for slot, grad in pairs]
    for batch, slot in zip(alone, together.slots, strict=True):
        for ours, theirs in zip(batch.slots[0].states, slot.states, strict=True):
            ours.copy_(theirs)
        CPU.step(batch)
    CPU.step(together)
    for index, batch in enumerate(alone):
        assert same_bits(results(batch)[0][0], results(together)[0][index])


def dot(x: Tensor, y: Tensor) -> float:
    """In float64, summed in pairs: more precise than ``Tensor.norm``."""
    return float((x * y).sum())


@every_dtype
@every_formula
def test_kernels_compute_the_formulas(formula: str, dtype: torch.dtype, seed: int) -> None:
    """Beside the Python formulas in float64, and a rotation by projection instead of the closed form."""
    batch = random_batch(formula, dtype, seed)
    row, lr, wide = batch.formula, LR, torch.float64
    before = [slot.param.to(wide, copy=True) for slot in batch.slots]
    old_states = [tuple(state.to(wide, copy=True) for state in slot.states) for slot in batch.slots]
    CPU.step(batch)
    epsilon = torch.finfo(dtype).eps
    for index, slot in enumerate(batch.slots):
        options = row.prepare(torch.ones((), dtype=wide), batch.options(slot))
        grad, w = batch.grads[index].to(wide), before[index]
        states = row.advance(grad, old_states[index], options)
        for ours, theirs in zip(slot.states, states, strict=True):
            torch.testing.assert_close(ours.to(wide), theirs, rtol=4 * epsilon, atol=4 * epsilon)
        u = row.step(grad, states, options)
        n2, d, q = dot(w, w), dot(w, u), dot(u, u)
        expected = torch.tensor([n2, d, q], dtype=wide)
        # Where a step nearly cancels, its error is still that of the numbers that it is made of.
        parts = sum(dot(part, part) ** 0.5 for part in (grad, *states))
        scale = torch.tensor([n2, n2**0.5 * (q**0.5 + parts), q**0.5 * (q**0.5 + parts)], dtype=wide)
        # Each addition of a tile's partial sum rounds once more, and such errors grow as the root of their number.
        allowed = (4 + (w.numel() / CPU.tile) ** 0.5) * epsilon * scale
        assert ((batch.dots[index] - expected).abs() <= allowed).all()
        if slot.radius is None:
            turned = w - lr * u
        else:
            across = u - d / n2 * w
            turned = w - lr * (n2 / dot(across, across)) ** 0.5 * across
            turned *= (n2 / dot(turned, turned)) ** 0.5
            assert float(slot.radius) == pytest.approx(n2**0.5, rel=1e-14)
        assert float((slot.param.to(wide) - turned).norm()) <= 4 * epsilon * (n2**0.5 + lr * (q**0.5 + parts))


@dataclass(frozen=True)
class Spot:
    """Where something is not finite: in the gradient, in the states or in both."""

    name: str
    grad: bool
    state: bool


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "spot", [Spot("gradient", True, False), Spot("states", False, True), Spot("both", True, True)], ids=lambda s: s.name
)
@every_dtype
@every_formula
def test_elements_that_are_not_finite_count_once_as_zero(
    formula: str, dtype: torch.dtype, spot: Spot, value: float, seed: int
) -> None:
    places = [0, 15, 16, 511, 512, 4095, 4096, 90_032]
    broken, clean = (random_batch(formula, dtype, seed, [(3, 30_011)]) for _ in range(2))
    states = broken.slots[0].states
    for batch in (broken, clean):
        filler = value if batch is broken else 0.0
        batch.grads[0].view(-1)[places] = filler if spot.grad else 0.0
        for state in batch.slots[0].states:
            state.view(-1)[places] = filler if spot.state else 0.0
        CPU.step(batch)
    spoils = spot.grad or (spot.state and bool(states))
    assert int(broken.counts[0, Count.NON_FINITE]) == (len(places) if spoils else 0)
    assert int(clean.counts[0, Count.NON_FINITE]) == 0
    assert same_bits(results(broken)[:3], results(clean)[:3])
    assert torch.isfinite(broken.params[0]).all()


def test_non_finite_elements_are_counted_across_tiles_and_steps(seed: int) -> None:
    batch = random_batch("sgd_momentum", torch.float32, seed, [(1_300_021, 1)])
    bad = torch.rand(1_300_021, generator=torch.Generator().manual_seed(seed)) < 0.01
    batch.grads[0][bad] = float("nan")
    for _ in range(3):
        CPU.step(batch)
    assert int(batch.counts[0, Count.NON_FINITE]) == 3 * int(bad.sum())


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 15])
@every_dtype
@every_formula
def test_views_at_odd_addresses_give_the_same_bits_and_nothing_beside_them_changes(
    formula: str, dtype: torch.dtype, offset: int, seed: int
) -> None:
    sentinel = 12345.0
    plain = random_batch(formula, dtype, seed, [(5,), (3, 1371), (2, 60_001)])

    def moved(tensor: Tensor) -> Tensor:
        memory = torch.full((tensor.numel() + 64,), sentinel, dtype=dtype)
        memories.append((memory, tensor.numel()))
        view = memory[offset : offset + tensor.numel()].view(tensor.shape)
        return view.copy_(tensor)

    memories: list[tuple[Tensor, int]] = []
    odd = make_batch(formula, [moved(p) for p in plain.params], [moved(g) for g in plain.grads])
    for ours, theirs in zip(odd.slots, plain.slots, strict=True):
        ours.states = tuple(moved(state) for state in theirs.states)
    odd = Batch(odd.formula, odd.slots, CPU.tile)
    odd.grads = [memory[offset : offset + n] for memory, n in memories[3:6]]
    odd.refresh()
    CPU.step(odd)
    CPU.step(plain)
    assert same_bits(results(odd), results(plain))
    for memory, n in memories:
        assert (memory[:offset] == sentinel).all()
        assert (memory[offset + n :] == sentinel).all()


def test_denormal_momentum_becomes_zero_and_the_callers_arithmetic_is_left_alone(seed: int) -> None:
    batch = random_batch("sgd_momentum", torch.float32, seed, [(600, 1000), (10, 10)])
    for slot, grad in zip(batch.slots, batch.grads, strict=True):
        slot.states[0].fill_(1e-39)
        grad.zero_()
    CPU.step(batch)
    assert all((slot.states[0] == 0).all() for slot in batch.slots)
    # Long enough that torch's threads, which the kernels share, all take part.
    denormals = torch.full((1 << 20,), 1e-39)
    assert (denormals * 0.5 != 0).all()


def test_a_zero_step_leaves_denormal_weights_alone(seed: int) -> None:
    torch.manual_seed(seed)
    weights = [torch.full((length,), 1e-39) for length in (40, 300_000)]
    batch = make_batch("sgd", weights, [torch.zeros_like(weight) for weight in weights])
    before = [weight.clone() for weight in weights]
    CPU.step(batch)
    assert same_bits(weights, before)


@pytest.mark.parametrize(
    ("weight", "grad", "dtype"),
    [((1e-39, 1.0, -0.0), (0.0, 1.0, -0.0), torch.float32), ((0.0, 1.0), (1e-200, 0.0), torch.float64)],
)
def test_one_pass_gives_the_bits_of_the_verbs(
    weight: tuple[float, ...], grad: tuple[float, ...], dtype: torch.dtype
) -> None:
    """Numbers that any arithmetic would change, and squares that are too small for numbers."""
    fused, verbs = (
        make_batch("sgd", [torch.tensor(weight, dtype=dtype)], [torch.tensor(grad, dtype=dtype)]) for _ in range(2)
    )
    CPU.step(fused)
    CPU.measure(verbs)
    CPU.coefficients(verbs)
    CPU.rotate(verbs)
    assert same_bits(results(fused), results(verbs))


def test_a_tensor_without_a_gradient_is_not_touched(seed: int) -> None:
    batch = random_batch("sgd_nesterov", torch.float32, seed)
    batch.grads = [grad if i % 2 else None for i, grad in enumerate(batch.grads)]
    batch.refresh()
    batch.dots.fill_(1.0)
    before = [[slot.param.clone(), [state.clone() for state in slot.states]] for slot in batch.slots]
    CPU.step(batch)
    for index, slot in enumerate(batch.slots):
        left_alone = same_bits(before[index], [slot.param, list(slot.states)])
        assert left_alone == (index % 2 == 0)
        if index % 2 == 0:
            assert (batch.dots[index] == 0).all()
            assert batch.coefficients[index, Coefficient.MODE] == KEEP


def test_slices_are_layers_of_their_own(seed: int) -> None:
    torch.manual_seed(seed)
    weight, grad = torch.randn(5, 100_003), torch.randn(5, 100_003)
    whole = make_batch("sgd_momentum", [weight], [grad], layers=5)
    parts = make_batch("sgd_momentum", list(weight.clone()[:, None]), list(grad[:, None]))
    for part, state in zip(parts.slots, whole.slots[0].states[0], strict=True):
        part.states[0].copy_(state)
    CPU.step(whole)
    CPU.step(parts)
    assert same_bits(whole.dots, parts.dots)
    assert same_bits(whole.params[0], torch.cat(parts.params))
    assert same_bits(whole.slots[0].radius, torch.cat([slot.radius for slot in parts.slots]))


def test_a_formula_or_type_without_kernels_is_named(seed: int) -> None:
    batch = random_batch("sgd", torch.float32, seed, [(2, 2)])
    batch.dtype = torch.float8_e5m2
    with pytest.raises(ValueError, match=r"dtype='float8_e5m2': there are float32 float64 bfloat16 float16"):
        CPU.step(batch)
