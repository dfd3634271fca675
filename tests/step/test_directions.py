"""Steps along directions of whole matrices: what keeps bits, windows, stacks, types, and all around a step."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.formulas.orthogonal import NewtonSchulz
from layca_fast.step import directions

from ..in_backward.support import assert_same, train_in_backward
from ..support import (
    BACKENDS,
    clones,
    contents,
    copy_of,
    every_backend,
    native_backends,
    norm_of,
    parameter,
    params_of,
    random_gradients,
    relative_distance,
    same_bits,
    train,
)

#: Wide, tall and square; a convolution, packed matrices, experts, one row, one column, nothing.
SHAPES = ((5, 9), (9, 5), (6, 6), (4, 3, 2, 2), (6, 4), (3, 4, 5), (1, 4), (4, 1), (0, 3), (9, 5))


def muon(params: list[Parameter], lr: float = 0.1, **options: Any) -> FusedLayca:
    """Groups of both rules, chunks, and plain steps."""
    groups = [
        {"params": params[:4]},
        {"params": params[4:5], "chunks": 3},
        {"params": params[5:6], "chunks": "all", "rule": "hyperball"},
        {"params": params[6:9], "momentum": 0.7, "nesterov": False, "ns_steps": 3},
        {"params": params[9:], "rotate": False, "weight_decay": 0.05, "maximize": True},
    ]
    return FusedLayca(groups, lr, base="muon", **options)


def running(backend: str = "torch", dtype: torch.dtype = torch.float32, **options: Any) -> FusedLayca:
    """In the middle of a run."""
    optimizer = muon([parameter(*shape, backend=backend, dtype=dtype) for shape in SHAPES], backend=backend, **options)
    train(optimizer, random_gradients(params_of(optimizer), 1 if backend == "triton" else 3))
    return optimizer


@every_backend
def test_at_lr_0_weights_keep_every_bit_and_the_momentum_moves(backend: str, seed: int) -> None:
    optimizer = running(backend)
    before = contents(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(optimizer, random_gradients(params_of(optimizer), 1))
    for (weight, _, state), (old, _, old_state) in zip(contents(optimizer), before, strict=True):
        assert same_bits(weight, old)
        assert same_bits(state.get("radius"), old_state.get("radius"))
        assert weight.numel() == 0 or not same_bits(state["momentum_buffer"], old_state["momentum_buffer"])


@every_backend
def test_a_momentum_of_zeros_has_no_direction(backend: str, seed: int) -> None:
    """Beside one that has, in one stack: the layer keeps its bits, and its radius stays unset."""
    params = [parameter(4, 5, backend=backend) for _ in range(2)]
    optimizer = FusedLayca(params, 0.1, base="muon", backend=backend)
    before = copy_of(params)
    (row,) = random_gradients(params, 1)
    train(optimizer, [[row[0].zero_(), row[1]]])
    assert same_bits(params[0].detach(), before[0])
    assert not same_bits(params[1].detach(), before[1])
    assert float(optimizer.state[params[0]]["radius"]) == 0.0
    assert [int(optimizer.rotation_stats()[param].no_direction) for param in params] == [1, 0]


@every_backend
def test_zero_gradients_of_a_first_step_change_nothing(backend: str, seed: int) -> None:
    """What makes an optimizer create its state, at any lr."""
    params = [parameter(*shape, backend=backend) for shape in SHAPES[:9]]
    optimizer = FusedLayca(params, 0.1, base="muon", backend=backend)
    before = copy_of(params)
    train(optimizer, [[torch.zeros_like(param) for param in params]])
    assert same_bits(copy_of(params), before)


@every_backend
def test_elements_that_are_not_finite_count_as_zero(backend: str, seed: int) -> None:
    """In the gradient; they are counted in the tensor, and never reach the momentum."""
    optimizer = running(backend)
    twin = copy.deepcopy(optimizer)
    (row,) = random_gradients(params_of(optimizer), 1)
    spoilt = copy_of(row)
    row[0][2, 3] = row[0][1, 1] = 0.0
    spoilt[0][2, 3], spoilt[0][1, 1] = torch.nan, torch.inf
    train(optimizer, [spoilt])
    train(twin, [row])
    for (weight, _, state), (other, _, expected) in zip(contents(optimizer), contents(twin), strict=True):
        assert same_bits(weight, other)
        assert same_bits(state, expected)
    counts = [optimizer.rotation_stats()[param].non_finite.sum().item() for param in params_of(optimizer)]
    assert counts == [2, *[0] * 9]


@every_backend
def test_a_parameter_without_a_gradient_is_left_alone(backend: str, seed: int) -> None:
    optimizer = running(backend)
    before = contents(optimizer)
    (row,) = random_gradients(params_of(optimizer), 1)
    train(optimizer, [[None if i in (0, 4) else grad for i, grad in enumerate(row)]])
    after = contents(optimizer)
    for i, (now, old) in enumerate(zip(after, before, strict=True)):
        assert same_bits([now[0], now[2]], [old[0], old[2]]) == (i in (0, 4, 8)), i
    train(optimizer, [[None] * len(row)])
    assert all(same_bits(now[0], old[0]) for now, old in zip(contents(optimizer), after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@native_backends
def test_windows_and_stacks_of_any_size_give_the_same_bits(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whichever matrices a matrix is made with, and in whatever memory: of one window nothing is left in the next."""
    params = [parameter(*shape, backend=backend, dtype=dtype) for shape in SHAPES * 2]
    rows = random_gradients(params[:10], 3)
    results = []
    for window, stack in ((2**24, 2**22), (100, 2**22), (2**24, 50), (1, 1)):
        monkeypatch.setitem(directions.WINDOW, "cpu", window)
        monkeypatch.setitem(directions.STACK, "cpu", stack)
        optimizer = muon(clones(params[:10]), backend=backend)
        train(optimizer, rows)
        results.append(contents(optimizer))
    assert all(same_bits(each, results[0]) for each in results)


def test_scratch_is_bounded_and_kept(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Twice the matrices take no more of it than one window, and further steps allocate no other."""
    monkeypatch.setitem(directions.WINDOW, "cpu", 1000)
    monkeypatch.setitem(directions.STACK, "cpu", 1000)
    sizes = []
    for count in (10, 20):
        params = [parameter(20, 20) for _ in range(count)]
        optimizer = FusedLayca(params, 0.1, base="muon")
        train(optimizer, random_gradients(params, 1))
        buffers = optimizer._plan._scratch._buffers
        before = {key: buffer.data_ptr() for key, buffer in buffers.items()}
        sizes.append(sum(buffer.numel() for buffer in buffers.values()))
        train(optimizer, random_gradients(params, 2))
        assert {key: buffer.data_ptr() for key, buffer in buffers.items()} == before
    assert sizes[0] == sizes[1] <= 6 * 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_backend
def test_steps_in_backward_are_the_ordinary_ones(backend: str, dtype: torch.dtype, seed: int) -> None:
    params = [parameter(*shape, backend=backend, dtype=dtype) for shape in SHAPES]
    ordinary, inside = (muon(clones(params), backend=backend) for _ in range(2))
    inside.step_in_backward()
    rows = random_gradients(params, 2)
    train(ordinary, rows)
    train_in_backward(inside, rows)
    assert_same(inside, ordinary)


@native_backends
def test_copies_and_pickles_go_on_alike(backend: str, seed: int) -> None:
    optimizer = running(backend)
    rows = random_gradients(params_of(optimizer), 2)
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for each in (optimizer, *others):
        train(each, rows)
    assert all(same_bits(contents(each), contents(optimizer)) for each in others)


def test_a_run_may_move_between_backends(seed: int) -> None:
    """And the state stays what it is: every backend follows the same run."""
    optimizer = running("torch", ns_dtype=torch.float64)
    fixed = copy.deepcopy(optimizer)
    for backend in (*BACKENDS, "torch"):
        for group in optimizer.param_groups:
            group["backend"] = backend
        rows = random_gradients(params_of(optimizer), 1)
        train(optimizer, rows)
        train(fixed, rows)
    for ours, theirs in zip(params_of(optimizer), params_of(fixed), strict=True):
        assert relative_distance(ours, theirs) <= 1e-6
        assert set(optimizer.state[ours]) == set(fixed.state[theirs])


@native_backends
def test_options_may_change_mid_run(backend: str, seed: int) -> None:
    """As a schedule of momentum does it, and iterations of another kind, type or number."""
    changes: list[dict[str, Any]] = [
        {"momentum": 0.5},
        {"ns_steps": 3},
        {"ns_coefficients": (2.0, -1.5, 0.5)},
        {"ns_dtype": torch.float64},
        {"nesterov": False},
    ]
    param = parameter(6, 15, backend=backend)
    optimizer = FusedLayca([param], 0.1, base="muon", backend=backend)
    options: dict[str, Any] = {}
    for change in changes:
        options |= change
        optimizer.param_groups[0].update(change)
        (twin,) = clones([param])
        fresh = FusedLayca([twin], 0.1, base="muon", backend=backend, **options)
        if optimizer.state[param]:
            fresh.state[twin] = copy_of(dict(optimizer.state[param]))
        before = param.detach().clone()
        rows = random_gradients([param], 1)
        train(optimizer, rows)
        train(fresh, rows)
        assert same_bits(param.detach(), twin.detach())
        assert not same_bits(param.detach(), before)


@native_backends
def test_convolutions_in_channels_last_and_matrices_with_gaps(backend: str, seed: int) -> None:
    """The direction is that of the matrix, however its elements lie; what kernels cannot walk goes to torch."""
    weight, matrix = torch.randn(6, 4, 3, 3), torch.randn(6, 8)
    rows = random_gradients([weight, matrix], 3)
    results = []
    for turned in (False, True):
        conv = Parameter(weight.clone())
        gaps = Parameter(matrix.clone())
        if turned:
            conv = Parameter(weight.clone(memory_format=torch.channels_last))
            gaps = Parameter(torch.stack((matrix, matrix), 2)[:, :, 0])
        options = {"backend": backend if not turned or backend == "torch" else "auto"}
        optimizer = FusedLayca([conv, gaps], 0.1, base="muon", **options)
        train(optimizer, rows)
        results.append([conv.detach(), gaps.detach()])
    for one, other in zip(*results, strict=True):
        assert relative_distance(one, other) <= 1e-6


@every_backend
def test_telemetry_is_that_of_the_direction(backend: str, seed: int) -> None:
    """Of plain steps with the growth that adjust_lr says, of which rotations know nothing."""
    params = [parameter(16, 4, backend=backend) for _ in range(2)]
    grads = random_gradients(params[:1], 1)[0] * 2
    groups = [{"params": params[:1]}, {"params": params[1:], "rotate": False}]
    optimizer = FusedLayca(groups, 0.1, base="muon", backend=backend)
    train(optimizer, [grads])
    stats = [optimizer.rotation_stats()[param] for param in params]
    assert float(stats[0].angle) == pytest.approx(torch.tensor(0.1).double().atan().item(), rel=1e-6)
    for each in stats:
        # Four singular values near 1, times the root of 16 / 4.
        assert 2 * 4**0.5 * 0.67 <= float(each.step_norm) <= 2 * 4**0.5 * 1.21


def test_directions_are_of_the_parameters_own_scale(seed: int) -> None:
    """A gradient of any size that float32 can hold, but for what eps hides."""
    results = []
    for scale in (1.0, 1e-30, 1e30):
        torch.manual_seed(seed)
        param = parameter(8, 12)
        optimizer = FusedLayca([param], 0.1, base="muon", eps=0.0)
        train(optimizer, [[torch.randn(8, 12) * scale]])
        results.append(param.detach())
    assert all(relative_distance(each, results[0]) <= 1e-6 for each in results)


def test_ns_dtype_is_bfloat16_on_gpus_and_wider_elsewhere() -> None:
    group = FusedLayca([parameter(2, 2)], base="muon").param_groups[0]
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    found = {(d, t): NewtonSchulz.of(group, t, d).dtype for d in (cpu, gpu) for t in (torch.float32, torch.float64)}
    assert found[cpu, torch.float32] == torch.float32
    assert found[gpu, torch.float32] == torch.bfloat16
    assert found[cpu, torch.float64] == found[gpu, torch.float64] == torch.float64


def test_closures_and_schedulers(seed: int) -> None:
    """The bits of steps on gradients that are set by hand, at rates and momenta that are."""
    param = parameter(5, 4)
    (other,) = clones([param])
    optimizer, by_hand = (FusedLayca([each], 0.1, base="muon") for each in (param, other))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param - 1).square().sum()
        loss.backward()
        return loss.detach()

    norm, momenta = norm_of(param), set()
    for _ in range(4):
        by_hand.param_groups[0].update({name: optimizer.param_groups[0][name] for name in ("lr", "momentum")})
        momenta.add(optimizer.param_groups[0]["momentum"])
        loss = (other.detach() - 1).square().sum()
        other.grad = 2 * (other.detach() - 1)
        assert optimizer.step(closure) == loss
        by_hand.step()
        schedule.step()
        assert same_bits([param.detach()], [other.detach()])
    assert len(momenta) > 1
    assert norm_of(param) == pytest.approx(norm, rel=1e-6)
