"""CUDA and Triton on a GPU: the numbers of the reference and of the CPU backend, whatever the tensors look like."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.commands.cases import BASE_OPTIONS, Case
from layca_fast.commands.verify import compare
from layca_fast.formulas.options import RULES

from ..backends.test_equivalence import LARGE, cases
from ..support import contents, params_of, relative_distance, same_bits, shapes_for
from .support import GPU, GPU_BACKENDS, ON_GPU, SHAPES, every_gpu_backend, give, on, ready, weights

pytestmark = ON_GPU

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-12}

#: First dimensions that three chunks divide.
CHUNKED = ((12, 40), (9, 5, 7), (3, 1371))

#: Muon's products in one type everywhere.
MOVING = ({"momentum": 0.9}, {"base": "adam", "amsgrad": True}, {"base": "muon", "ns_dtype": torch.float64})


@pytest.mark.filterwarnings("ignore:weight_decay=.* is ignored")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
@every_gpu_backend
def test_follows_the_reference(backend: str, case: Case, seed: int) -> None:
    """Angle and norm at every step, weights after the last."""
    errors = compare(replace(case, steps=5), backend, GPU, seed)
    assert errors.passed, errors


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
@every_gpu_backend
def test_follows_the_reference_at_size(backend: str, case: Case, seed: int) -> None:
    errors = compare(replace(case, steps=min(case.steps, 10)), backend, GPU, seed)
    assert errors.passed, errors


@pytest.mark.parametrize("sine", [0.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("n", [100, 10_000, 300_000])
@every_gpu_backend
def test_nearly_parallel_steps_turn_by_the_right_angle(backend: str, n: int, sine: float, seed: int) -> None:
    errors = compare(Case(f"sin = {sine}", ((n // 10, 10),), steps=3, lr=0.05, sine=sine), backend, GPU, seed)
    assert errors.passed, errors


def assert_alike(actual: FusedLayca, expected: FusedLayca, tolerance: float) -> None:
    for ours, theirs in zip(params_of(actual), params_of(expected), strict=True):
        assert relative_distance(ours, theirs) <= tolerance
        assert set(actual.state[ours]) == set(expected.state[theirs])
        for name, value in expected.state[theirs].items():
            assert relative_distance(actual.state[ours][name], value) <= tolerance, name


@pytest.mark.parametrize("chunks", [1, 3, "all"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", BASE_OPTIONS, ids=str)
@every_gpu_backend
def test_equals_the_cpu_backend_after_50_steps(
    backend: str, options: dict[str, Any], rule: str, dtype: torch.dtype, chunks: int | str, seed: int
) -> None:
    start = weights(shapes_for(options, SHAPES if chunks == 1 else CHUNKED), dtype)
    more = {"rule": rule, "chunks": chunks, **options}
    ours = FusedLayca(on(GPU, start), 0.03, backend=backend, **more)
    theirs = FusedLayca(on(CPU, start), 0.03, backend="cpu", **more)
    for _ in range(50):
        grads = [torch.randn_like(tensor) for tensor in start]
        for optimizer in (ours, theirs):
            give(optimizer, grads)
            optimizer.step()
    assert_alike(ours, theirs, TOLERANCES[dtype])


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"base": "adam"}, {"base": "lion"}, {"base": "muon"}], ids=str)
@every_gpu_backend
def test_the_same_inputs_give_the_same_bits(backend: str, options: dict[str, Any], seed: int) -> None:
    shapes = [(1024, 1025), *shapes_for(options, SHAPES)]
    start, grads = weights(shapes), [weights(shapes) for _ in range(5)]

    def run() -> list[Any]:
        optimizer = FusedLayca(on(GPU, start), 0.03, backend=backend, **options)
        for row in grads:
            give(optimizer, row)
            optimizer.step()
        return contents(optimizer)

    first = run()
    # What lies in memory that is used again must not matter.
    torch.full((1 << 24,), float("nan"), device=GPU)
    assert same_bits(first, run())


@pytest.mark.parametrize("offset", [1, 2, 3])
@every_gpu_backend
def test_views_at_odd_addresses(backend: str, offset: int, seed: int) -> None:
    """They give what aligned tensors give, and nothing beside them changes."""
    shapes = ((5,), (70, 91), (2, 60_001))
    start, grads = weights(shapes), [weights(shapes) for _ in range(3)]
    plain = FusedLayca(on(GPU, start), 0.03, momentum=0.9, nesterov=True, backend=backend)
    rooms = [torch.full((tensor.numel() + 8,), 12345.0, device=GPU) for tensor in start]

    def view(room: Tensor, tensor: Tensor) -> Tensor:
        return room[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)

    views = [Parameter(view(room, tensor)) for room, tensor in zip(rooms, start, strict=True)]
    odd = FusedLayca(views, 0.03, momentum=0.9, nesterov=True, backend=backend)
    for row in grads:
        give(plain, row)
        for param, grad in zip(views, row, strict=True):
            param.grad = view(torch.zeros(grad.numel() + 8, device=GPU), grad)
        for optimizer in (plain, odd):
            optimizer.step()
    assert_alike(odd, plain, 0.0 if backend == "cuda" else 2e-6)
    for room in rooms:
        assert (room[:offset] == 12345.0).all()
        assert (room[offset:] == 12345.0).sum() == 8 - offset


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", BASE_OPTIONS, ids=str)
@every_gpu_backend
def test_gradients_that_are_not_finite_count_as_zero(
    backend: str, options: dict[str, Any], value: float, seed: int
) -> None:
    start, grad = weights(((90, 91),)), torch.randn(90, 91)
    places = torch.rand(90, 91) < 0.01
    places[0, 0] = True
    filled = [[torch.where(places, torch.full_like(grad, filler), grad)] for filler in (value, 0.0)]
    optimizers = [FusedLayca(on(GPU, start), 0.03, backend=backend, **options) for _ in filled]
    for optimizer, grads in zip(optimizers, filled, strict=True):
        give(optimizer, grads)
        optimizer.step()
    broken, clean = (params_of(optimizer)[0] for optimizer in optimizers)
    assert same_bits(broken.detach(), clean.detach())
    assert same_bits(dict(optimizers[0].state[broken]), dict(optimizers[1].state[clean]))
    assert int(optimizers[0].rotation_stats()[broken].non_finite) == int(places.sum())


@every_gpu_backend
def test_a_tensor_without_a_gradient_is_left_alone(backend: str, seed: int) -> None:
    optimizer = ready(backend, momentum=0.9)
    grads: list[Tensor | None] = list(weights())
    grads[0] = grads[3] = None
    give(optimizer, grads)
    before = contents(optimizer)
    optimizer.step()
    for index, (old, new) in enumerate(zip(before, contents(optimizer), strict=True)):
        assert same_bits(old, new) == (grads[index] is None)


@pytest.mark.parametrize("order", list(itertools.permutations((*GPU_BACKENDS, "torch", "cpu"), 3)), ids="-".join)
@pytest.mark.parametrize("options", MOVING, ids=str)
def test_a_run_may_move_from_backend_to_backend(order: tuple[str, ...], options: dict[str, Any], seed: int) -> None:
    """The state is the same whichever made it."""
    shapes = shapes_for(options, SHAPES)
    start = weights(shapes)
    stays = FusedLayca(on(CPU, start), 0.03, backend="cpu", **options)
    moves, values, state = stays, start, None
    for backend in order:
        moves = FusedLayca(on(CPU if backend == "cpu" else GPU, values), 0.03, backend=backend, **options)
        if state is not None:
            moves.load_state_dict({**moves.state_dict(), "state": state["state"]})
        for _ in range(4):
            grads = weights(shapes)
            for optimizer in (stays, moves):
                give(optimizer, grads)
                optimizer.step()
        values, state = [param.detach() for param in params_of(moves)], moves.state_dict()
    assert_alike(moves, stays, 2e-6)


@pytest.mark.parametrize("start", GPU_BACKENDS)
def test_the_backend_of_a_group_may_change_mid_run(start: str, seed: int) -> None:
    values = weights()
    optimizer, twin = (FusedLayca(on(GPU, values), 0.03, momentum=0.9, backend=start) for _ in range(2))
    for backend in (*GPU_BACKENDS, "torch", *GPU_BACKENDS):
        optimizer.param_groups[0]["backend"] = backend
        grads = weights()
        for each in (optimizer, twin):
            give(each, grads)
            each.step()
    assert_alike(optimizer, twin, 2e-6)
