"""What is particular to the Triton backend: its tables, tiles and launches, and how it makes the formulas its own."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, sqrt, where

from layca_fast.backends import load
from layca_fast.backends.triton.backend import BACKEND
from layca_fast.backends.triton.launches import FINISH_BLOCK, TILE, Launch, finish_launch
from layca_fast.formulas.bases import FORMULAS, Formula
from layca_fast.formulas.rotation import KEEP
from layca_fast.formulas.tables import Coefficient, Column, Count, Tile
from layca_fast.state.slot import Slot
from layca_fast.step.batch import Batch

from ...support import HANGS, device_of, relative_distance, rows_by_formula, same_bits

pytest.importorskip("triton")

DEVICE = device_of("triton")
ROWS = rows_by_formula(lr=0.1, weight_decay=0.05)
MOMENTUM, NESTEROV, SGD = FORMULAS["sgd_momentum"], FORMULAS["sgd_nesterov"], FORMULAS["sgd"]


def batch_of(
    params: list[Tensor],
    grads: list[Tensor | None],
    formula: Formula = MOMENTUM,
    states: list[tuple[Tensor, ...]] | None = None,
    layers: int = 1,
    rotates: bool = True,
) -> Batch:
    """A batch on these very tensors, ready for its first step; states are random by default."""
    # Formulas of these tests' own take the options of SGD with momentum.
    base, group = ROWS.get(formula.name, ROWS["sgd_momentum"])
    slots = []
    for i, param in enumerate(params):
        state = states[i] if states else tuple(torch.rand_like(param) for _ in formula.states)
        radius = torch.zeros(layers, dtype=torch.float64, device=DEVICE) if rotates else None
        step = torch.zeros((), device=DEVICE) if formula.counts_steps else None
        slots.append(Slot(param, group, base, str(i), state, step, radius, layers, dense=True, fresh=False))
    batch = Batch(formula, slots, TILE)
    batch.grads = list(grads)
    batch.refresh()
    return batch


def twin(batch: Batch) -> Batch:
    """The same batch on copies of the tensors that a step modifies."""
    states = [tuple(state.clone() for state in slot.states) for slot in batch.slots]
    return batch_of([param.clone() for param in batch.params], batch.grads, batch.formula, states)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).to(DEVICE)


def results(batch: Batch) -> list[Any]:
    """All that a step writes."""
    radii = [slot.radius for slot in batch.slots]
    return [batch.params, batch.states, radii, batch.dots, batch.coefficients, batch.counts]


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_a_few_launches_do_what_the_three_verbs_do(
    formula: Formula, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tensors; a sharded model calls the verbs one by one, with an all-reduce between them."""
    shapes = ((3, 700), (40,), (TILE, 2), (5, 5))
    grads: list[Tensor | None] = [random(*shape) for shape in shapes]
    grads[3] = None
    whole = batch_of([random(*shape) for shape in shapes], grads, formula)
    before = whole.params[0].clone()
    split = twin(whole)
    launches: list[Launch] = []
    launch = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self: (launches.append(self), launch(self)))
    BACKEND.step(whole)
    assert len(launches) == 3 + formula.counts_steps
    for verb in (BACKEND.measure, BACKEND.coefficients, BACKEND.rotate):
        verb(split)
    assert same_bits(results(whole), results(split))
    assert not same_bits(whole.params[0], before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-7), (torch.float64, 1e-15)])
@pytest.mark.parametrize("size", [1, 3, 4, TILE - 4, TILE, TILE + 1, 2 * TILE + 8])
def test_tiles_of_every_length_at_every_alignment(size: int, dtype: torch.dtype, tolerance: float, seed: int) -> None:
    """Aligned tiles run another copy of the code. Whichever runs, nothing around the tensors may change."""
    values = [random(size, dtype=dtype) for _ in range(3)]
    param, grad, state = (value.clone() for value in values)
    expected = batch_of([param], [grad], NESTEROV, [(state,)])
    load("torch").step(expected)
    for offset in range(4):
        rooms = [torch.full((size + 8,), math.nan, dtype=dtype, device=DEVICE) for _ in values]
        views = [room[offset : offset + size].copy_(value) for room, value in zip(rooms, values, strict=True)]
        batch = batch_of([views[0]], [views[1]], NESTEROV, [(views[2],)])
        BACKEND.step(batch)
        for ours, theirs in zip(views, (param, grad, state), strict=True):
            assert relative_distance(ours, theirs) <= tolerance
        assert relative_distance(batch.dots, expected.dots) <= tolerance
        assert [int(room.isnan().sum()) for room in rooms] == [8, 8, 8]


def test_offsets_beyond_32_bits(seed: int) -> None:
    """Elements past a tensor's 2**31st: first addresses and offsets are shifted against one another."""
    far = batch_of([random(3, TILE)], [random(3, TILE)])
    near = twin(far)
    shift = 2**34 + 12
    far.tiles[:, Tile.OFFSET] += shift
    for column in (Column.PARAM, Column.GRAD, Column.STATE):
        far.tensors[:, column] -= shift * 4
    for batch in (far, near):
        BACKEND.step(batch)
    assert same_bits(results(far), results(near))
    assert far.coefficients[0, Coefficient.MODE] != KEEP


def test_finish_adds_up_any_number_of_tiles(seed: int) -> None:
    """Two layers of more tiles than finish takes at a time, the second one starting where the first one ends."""
    tiles = 2 * FINISH_BLOCK + 5
    param = torch.zeros(2, tiles * TILE, device=DEVICE)
    batch = batch_of([param], [param], SGD, layers=2)
    batch.partials.copy_(torch.randn(batch.partials.shape, dtype=torch.float64))
    batch.partial_counts.copy_(torch.randint(0, TILE, batch.partial_counts.shape))
    finish_launch(batch, sums=True, coefficients=False)()
    columns = batch.partials.view(2, tiles, 3).transpose(1, 2).tolist()
    exact = [[math.fsum(column) for column in layer] for layer in columns]
    torch.testing.assert_close(batch.dots.cpu(), torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-11)
    assert batch.counts[:, Count.NON_FINITE].tolist() == batch.partial_counts.view(2, tiles).sum(1).tolist()


@pytest.mark.parametrize("rotates", [True, False])
def test_a_missing_gradient_hides_what_an_earlier_step_left_behind(rotates: bool, seed: int) -> None:
    """The scratch for a tensor's partial sums is not cleared between steps. Neither is there any weight decay."""
    batch = batch_of([random(3, TILE)], [random(3, TILE)], rotates=rotates)
    BACKEND.step(batch)
    assert batch.partials.all()
    before = [value.clone() for value in (batch.params[0], batch.states[0][0], batch.counts)]
    batch.grads = [None]
    batch.refresh()
    BACKEND.step(batch)
    assert batch.dots.tolist() == [[0.0, 0.0, 0.0]]
    assert batch.coefficients[0, Coefficient.MODE] == KEEP
    assert same_bits([batch.params[0], batch.states[0][0], batch.counts], before)


SMALLEST = 2.0**-60


def _root(x: Any) -> Any:
    return sqrt(where(x * x > SMALLEST, x * x, SMALLEST))


def _roots_advance(grad: Any, state: Any, options: Any) -> Any:
    momentum, fraction = options
    first, second = state
    return momentum * first + fraction * _root(grad), second + grad * grad


def _roots_step(grad: Any, state: Any, options: Any) -> Any:
    return grad * _root(state[0]) + sqrt(state[1])


def test_any_formula_of_operators_where_and_sqrt_compiles(seed: int) -> None:
    """One that takes two states, calls another function and reads a constant."""
    formula = Formula("roots", _roots_advance, _roots_step, ("first", "second"), reads_grad=True)
    grad, states = random(3, 90), (random(3, 90), random(3, 90).abs())
    batch = batch_of([random(3, 90)], [grad], formula, [states])
    options = batch.options(batch.slots[0])
    assert len(options) == 2
    expected = _roots_advance(grad.double(), tuple(state.double() for state in states), options)
    step = _roots_step(grad.double(), expected, options)
    BACKEND.step(batch)
    for ours, exact in zip(states, expected, strict=True):
        assert relative_distance(ours, exact) <= 2e-7
    assert batch.dots[0, 2].item() == pytest.approx(step.square().sum().item(), rel=1e-6)


def _undefined_at_zero(grad: Any, state: Any, options: Any) -> Any:
    return grad / grad


def _one_at_zero(grad: Any, state: Any, options: Any) -> Any:
    return where(grad * grad > 0.0, grad / grad, 1.0)


@pytest.mark.parametrize("step", [_undefined_at_zero, _one_at_zero])
def test_lanes_beyond_the_end_of_a_tile_take_no_part(step: Callable[..., Any], seed: int) -> None:
    """Whatever a formula makes of the zeros that stand there, it is neither summed nor counted."""
    formula = Formula(step.__name__, SGD.advance, step, (), reads_grad=True)
    batch = batch_of([random(3, 90)], [random(3, 90)], formula)
    BACKEND.step(batch)
    assert batch.dots[0, 2] == 270
    assert batch.counts.tolist() == [[0, 0, 0]]


def _overflowing_in_float32(grad: Any, state: Any, options: Any) -> Any:
    return options[0] * grad * 1e30


def test_float32_formulas_run_in_float32(seed: int) -> None:
    """Options are float64 in their table, and would draw a formula into float64 if they were used as they stand."""
    formula = Formula("overflowing in float32", SGD.advance, _overflowing_in_float32, (), reads_grad=True)
    batch = batch_of([random(3, 90)], [torch.full((3, 90), 1e20, device=DEVICE)], formula)
    BACKEND.step(batch)
    assert batch.counts[0, Count.NON_FINITE] == 270
    assert batch.dots[0, 2] == 0


def test_other_devices_are_refused_with_the_reason() -> None:
    assert "TRITON_INTERPRET=1" in str(BACKEND.refuses(torch.device("meta")))


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ("import sys; sys.modules['triton'] = None", 'pip install "layca_fast[triton]"'),
        pytest.param("import triton; triton.__version__ = '3.2.0'", "too old", marks=pytest.mark.exhaustive),
        pytest.param(
            "import torch; torch.cuda.is_available = lambda: False", "TRITON_INTERPRET=1", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_missing_requirement_is_named(setup: str, reason: str) -> None:
    code = f"{setup}; from layca_fast.backends.triton.backend import BACKEND; print(BACKEND.missing())"
    out = subprocess.run(
        [sys.executable, "-c", code], env={}, check=True, capture_output=True, text=True, timeout=HANGS
    ).stdout
    assert reason in out


def test_importing_the_module_imports_no_triton() -> None:
    code = "import sys, layca_fast.backends.triton.backend; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANGS)
