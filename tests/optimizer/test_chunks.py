"""chunks: each form cuts a tensor into layers that train as tensors of their own do, to the last bit."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca, RotationMonitor, attach
from layca_fast.reference import slices

from ..support import (
    copy_of,
    device_of,
    every_backend,
    native_backends,
    params_of,
    same_bits,
    train,
)

BASES: Sequence[Mapping[str, Any]] = (
    {"momentum": 0.9, "nesterov": True},
    {"base": "adam", "betas": (0.8, 0.95), "rule": "hyperball"},
    {"base": "muon", "ns_dtype": torch.float64},
    {"momentum": 0.9, "radius": "learned"},
)


@dataclass(frozen=True)
class Form:
    """A form of the option for a tensor of ``shape``; ``order`` of its dimensions in memory, the outermost first."""

    chunks: Any
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()
    directs: bool = True


#: All lie so that every backend can walk them.
FORMS = (
    Form((5, 2, 3), (10, 7)),
    Form([3, 4], (7, 5, 2)),
    Form((1, 4, 1), (6, 33)),
    Form((6,), (6, 5)),
    Form("matrices", (3, 4, 5)),
    Form("matrices", (2, 3, 4, 5)),
    Form("matrices", (1, 3, 4, 5)),
    Form("matrices", (6, 5)),
    Form(("matrices", 2), (3, 4, 5)),
    Form(("matrices", 3), (2, 2, 6, 5)),
    Form(("matrices", 2), (6, 5)),
    Form("columns", (5, 7), (1, 0), directs=False),
    Form("columns", (4, 3, 2, 2), (1, 0, 2, 3), directs=False),
    Form(("columns", 3), (5, 6), (1, 0)),
    Form(("columns", (1, 4, 2)), (5, 7), (1, 0)),
    Form(("columns", [2, 1]), (4, 3, 2, 2), (1, 0, 2, 3)),
)


def laid_out(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The same numbers with these dimensions outermost in memory."""
    if not order:
        return tensor.clone(memory_format=torch.contiguous_format)
    back = [order.index(dim) for dim in range(len(order))]
    return tensor.permute(*order).contiguous().permute(*back)


def parts_of(tensor: Tensor, form: Form) -> list[Tensor]:
    """The layers as plain tensors, each with the dimension that is cut as its first."""
    return [part.clone(memory_format=torch.contiguous_format) for part in slices(tensor, form.chunks)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("form", "base"),
    # Of one column base="muon" makes no direction, and refuses it.
    [(form, base) for form in FORMS for base in BASES if form.directs or base.get("base") != "muon"],
    ids=str,
)
@every_backend
def test_layers_train_as_tensors_of_their_own(
    backend: str, form: Form, base: Mapping[str, Any], dtype: torch.dtype, seed: int
) -> None:
    """Weights, moments, radii and remainders bit for bit: whatever a step is made of, it is made of one layer."""
    device = device_of(backend)
    weight = torch.randn(form.shape, dtype=dtype).to(device)
    packed = Parameter(laid_out(weight, form.order))
    apart = [Parameter(part) for part in parts_of(weight, form)]
    options = {"backend": backend, "rotate": True, **base}
    one, many = FusedLayca([packed], 0.05, chunks=form.chunks, **options), FusedLayca(apart, 0.05, **options)
    for _ in range(3):
        grad = torch.randn(form.shape, dtype=dtype).to(device)
        train(one, [[laid_out(grad, form.order)]])
        train(many, [parts_of(grad, form)])
    assert same_bits(parts_of(packed.detach(), form), [part.detach() for part in apart])
    for name, value in one.state[packed].items():
        theirs = [many.state[part][name] for part in apart]
        if name == "radius":
            assert torch.equal(value, torch.cat(theirs))
        elif name != "step":
            assert same_bits(parts_of(value, form), theirs)


def test_columns_that_lie_row_by_row_take_the_torch_backend_or_an_error_says_so(seed: int) -> None:
    weight, grad = torch.randn(2, 6, 5)
    as_rows = FusedLayca([Parameter(weight.t().contiguous())], 0.1, chunks="all", backend="torch", momentum=0.9)
    columns = FusedLayca([Parameter(weight.clone())], 0.1, chunks="columns", momentum=0.9)
    train(as_rows, [[grad.t().contiguous()]] * 3)
    train(columns, [[grad]] * 3)
    assert torch.equal(params_of(columns)[0].t(), params_of(as_rows)[0])
    named = FusedLayca([("in", Parameter(weight.clone()))], 0.1, chunks="columns", backend="cpu")
    with pytest.raises(ValueError, match=r"'in'.*chunks='columns'.*backend='auto' or 'torch'.*contiguous\(\)\.mT"):
        train(named, [[grad]])
    assert torch.equal(params_of(named)[0], weight)


def test_a_column_of_zeros_is_found_before_anything_moves(seed: int) -> None:
    param = Parameter(torch.randn(6, 5).index_fill_(1, torch.tensor(2), 0.0))
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"all weights of a layer are zero in parameter 'w'"):
        train(FusedLayca([("w", param)], 0.1, chunks="columns"), [[torch.randn(6, 5)]])
    assert torch.equal(param, before)


def test_a_vector_in_a_group_of_stacked_matrices_is_one_layer(seed: int) -> None:
    vector, stack = Parameter(torch.randn(7)), Parameter(torch.randn(3, 4, 5))
    optimizer = FusedLayca([vector, stack], 0.1, rotate=True, chunks="matrices")
    train(optimizer, [[torch.randn(7), torch.randn(3, 4, 5)]])
    assert [len(optimizer.state[each]["radius"]) for each in (vector, stack)] == [1, 3]


@native_backends
def test_a_gradient_that_comes_and_goes_moves_all_parts_or_none(backend: str, seed: int) -> None:
    param, other = Parameter(torch.randn(6, 5)), Parameter(torch.randn(4, 3))
    groups = [{"params": [param], "chunks": (1, 2, 3)}, {"params": [other]}]
    optimizer = FusedLayca(groups, 0.1, base="adam", backend=backend)
    train(optimizer, [[torch.randn(6, 5), torch.randn(4, 3)]])
    before = copy_of([param, dict(optimizer.state[param])])
    train(optimizer, [[None, torch.randn(4, 3)]])
    assert same_bits(copy_of([param, dict(optimizer.state[param])]), before)
    train(optimizer, [[torch.randn(6, 5), None]])
    assert int(optimizer.state[param]["step"]) == 2
    assert all(bool((a != b).any()) for a, b in zip(param.split([1, 2, 3]), before[0].split([1, 2, 3]), strict=True))


@native_backends
def test_steps_inside_of_backward_and_skipped_ones_are_those_of_ordinary_steps(backend: str, seed: int) -> None:
    weight, inputs = torch.randn(6, 5), torch.randn(3, 5)
    plain, inside, scaled = (
        FusedLayca([Parameter(weight.clone())], 0.1, chunks=(1, 2, 3), momentum=0.9, backend=backend, **options)
        for options in ({}, {}, {"unscale_in_step": True})
    )
    inside.step_in_backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for x in inputs:
        for optimizer in (plain, inside):
            (param,) = params_of(optimizer)
            param.grad = None
            (param @ x).tanh().square().sum().backward()
            optimizer.step()
        (param,) = params_of(scaled)
        for factor in (float("inf"), 1.0):
            # The first is skipped.
            param.grad = None
            scaler.scale((param @ x).tanh().square().sum() * factor).backward()
            scaler.step(scaled)
            scaler.update(4.0)
    assert torch.equal(params_of(plain)[0], params_of(inside)[0])
    torch.testing.assert_close(params_of(scaled)[0], params_of(plain)[0], rtol=1e-5, atol=1e-6)


@native_backends
def test_copies_go_on_with_the_same_parts(backend: str, seed: int) -> None:
    optimizer = FusedLayca([Parameter(torch.randn(6, 5))], 0.1, chunks=[1, 2, 3], base="adam", backend=backend)
    train(optimizer, [[torch.randn(6, 5)]])
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["chunks"] == (1, 2, 3)
    for grad in torch.randn(2, 6, 5):
        train(optimizer, [[grad]])
        train(twin, [[grad]])
    assert same_bits(params_of(twin)[0].detach(), params_of(optimizer)[0].detach())
    assert same_bits(dict(twin.state[params_of(twin)[0]]), dict(optimizer.state[params_of(optimizer)[0]]))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_attach_turns_the_same_layers(form: Form, seed: int) -> None:
    """Given to attach or by the group; the monitor watches the layers that turn."""
    weight, grad = torch.randn(2, *form.shape)
    ours = FusedLayca([Parameter(laid_out(weight, form.order))], 0.05, chunks=form.chunks, rotate=True)
    theirs = torch.optim.SGD([Parameter(laid_out(weight, form.order))], 0.05)
    attach(theirs, chunks=form.chunks, rotate=True)
    grouped = torch.optim.SGD([{"params": [Parameter(laid_out(weight, form.order))], "chunks": form.chunks}], 0.05)
    attach(grouped, rotate=True)
    monitors = [RotationMonitor(each, per_step=True) for each in (ours, theirs, grouped)]
    for optimizer, monitor in zip((ours, theirs, grouped), monitors, strict=True):
        params_of(optimizer)[0].grad = laid_out(grad, form.order)
        optimizer.step()
        monitor.record()
    for optimizer in (theirs, grouped):
        torch.testing.assert_close(params_of(optimizer)[0], params_of(ours)[0], rtol=1e-4, atol=1e-5)
    angle = torch.full((len(slices(weight, form.chunks)),), 0.05, dtype=torch.float64).atan()
    for monitor in monitors:
        assert monitor.names == monitors[0].names
        torch.testing.assert_close(monitor.curves.angle[-1], angle, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep", ["device", "cpu", "sketch"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_curves_are_those_of_the_layers(form: Form, keep: str, seed: int) -> None:
    weight = torch.randn(form.shape)
    param = Parameter(weight.clone())
    monitor = RotationMonitor(FusedLayca([param], 0.1, chunks=form.chunks, rotate=True), keep=keep)
    apart = [Parameter(part) for part in parts_of(weight, form)]
    alone = RotationMonitor(FusedLayca(apart, 0.1, rotate=True), keep=keep)
    weight += torch.randn_like(weight)
    with torch.no_grad():
        param.copy_(weight)
        for part, now in zip(apart, parts_of(weight, form), strict=True):
            part.copy_(now)
    for each in (monitor, alone):
        each.record()
    for name in ("rotation", "norm"):
        torch.testing.assert_close(getattr(monitor.curves, name), getattr(alone.curves, name), rtol=1e-12, atol=1e-12)


def test_statistics_and_curves_are_named_by_part(seed: int) -> None:
    qkv, experts = ("blocks.3.qkv", Parameter(torch.randn(7, 4))), ("moe", Parameter(torch.randn(2, 6, 4)))
    groups = [
        {"params": [qkv], "chunks": (4, 2, 1), "chunk_names": ["query", "key", "value"]},
        {"params": [experts], "chunks": ("matrices", 2), "chunk_names": ("gate", "up")},
        {"params": [("plain", Parameter(torch.randn(4, 3)))], "chunks": 2},
        {"params": [("whole", Parameter(torch.randn(4, 3)))]},
    ]
    optimizer = FusedLayca(groups, 0.1)
    monitor = RotationMonitor(optimizer)
    train(optimizer, [[torch.randn_like(param) for param in params_of(optimizer)]])
    stats = optimizer.rotation_stats()
    names = [name for each in stats.values() for name in each.layer_names]
    assert names == [
        *("blocks.3.qkv[query]", "blocks.3.qkv[key]", "blocks.3.qkv[value]"),
        *("moe[0][gate]", "moe[0][up]", "moe[1][gate]", "moe[1][up]"),
        *("plain[0]", "plain[1]", "whole"),
    ]
    assert monitor.names == names
    rows = str(stats).splitlines()[1:]
    assert [row.split()[0] for row in rows] == [*names[:3], "moe[gate]", "moe[up]", "plain", "whole"]
    assert [row.split()[1] for row in rows] == ["1", "1", "1", "2", "2", "2", "1"]
    expected = torch.stack([part.norm() for part in slices(qkv[1].detach().double(), (4, 2, 1))])
    torch.testing.assert_close(stats[qkv[1]].radius, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("chunks", "names", "error", "message"),
    [
        (3, "qkv", TypeError, r"chunk_names='qkv': must be a list of names"),
        (3, ("q", "k", 3), TypeError, r"must be a list of names"),
        (3, ("q", "k", "k"), ValueError, r"has a name twice"),
        (3, ("q", "k"), ValueError, r"are 2 names, and chunks=3 cuts 3 parts"),
        ((4, 2), ("q", "k", "v"), ValueError, r"are 3 names, and chunks=\(4, 2\) cuts 2 parts"),
        ("all", ("q", "k"), ValueError, r"are 2 names, and .*'packed' .*is cut into 6 layers"),
    ],
    ids=str,
)
def test_names_that_do_not_fit_are_refused(
    chunks: Any, names: Any, error: type[Exception], message: str, seed: int
) -> None:
    param = Parameter(torch.randn(6, 4))
    before = param.detach().clone()
    with pytest.raises(error, match=message):
        train(FusedLayca([("packed", param)], 0.1, chunks=chunks, chunk_names=names), [[torch.randn(6, 4)]])
    assert torch.equal(param, before)


def test_the_guard_names_parts_and_a_given_radius_knows_the_shape_of_each(seed: int) -> None:
    qkv, columns = Parameter(torch.randn(7, 4)), Parameter(torch.randn(5, 6))
    groups = [
        {"params": [("qkv", qkv)], "chunks": (4, 2, 1), "chunk_names": ("query", "key", "value")},
        {"params": [("in", columns)], "chunks": "columns"},
    ]
    optimizer = FusedLayca(groups, 0.1, radius=lambda shape: float(shape.numel()))
    train(optimizer, [[torch.randn(7, 4), torch.randn(5, 6)]] * 2)
    assert optimizer.state[qkv]["radius"].tolist() == [16, 8, 4]
    assert optimizer.state[columns]["radius"].tolist() == [5] * 6
    optimizer.check_norms(1e-5, at="now")
    with torch.no_grad():
        qkv[4:6] *= 0.5
    assert list(optimizer.check_norms(at="now").above(1e-3)) == ["qkv[key]"]
