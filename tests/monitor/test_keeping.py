"""What keeps the initial weights: its bytes, its error, and what happens when weights move or change type."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layca_fast import FusedLayca, RotationMonitor
from layca_fast.commands.demo.training import rotation_from
from layca_fast.monitor import pairs
from layca_fast.monitor.keeping import KEEPS
from layca_fast.monitor.projection import Projection, largest_prime

from ..support import parameter, same_bits

SHAPES = ((12, 50), (5, 7, 3, 3), (1, 1), (3, 4099))


def network() -> nn.ParameterList:
    return nn.ParameterList([parameter(*shape) for shape in SHAPES])


def optimizer_of(params: Any) -> FusedLayca:
    groups = [
        {"params": [params[0]], "chunks": 6},
        {"params": [*params[1:3]]},
        {"params": [params[3]], "chunks": "all"},
    ]
    return FusedLayca(groups, 0.1)


def walk(params: Any, share: float) -> None:
    """Change every weight, each in a size of its own."""
    for param in params:
        param.data += (share * torch.randn(param.shape)).to(param.dtype)


@pytest.mark.parametrize(
    ("keep", "bytes_each"),
    [("device", 4), ("cpu", 4), ("bfloat16", 2)],
)
def test_bytes_of_whole_copies(keep: str, bytes_each: int, seed: int) -> None:
    numbers = sum(math.prod(shape) for shape in SHAPES)
    params = network()
    assert RotationMonitor(optimizer_of(params), keep=keep).nbytes == bytes_each * numbers
    if keep != "bfloat16":
        assert RotationMonitor(optimizer_of(params), keep=keep, per_step=True).nbytes == 2 * bytes_each * numbers


def test_bytes_of_sketches_do_not_grow_with_the_layers(seed: int) -> None:
    """Under 4 MB for the 225 matrices of a language model of 7 billion weights, each of more than 4,093."""
    weights = [parameter(100, 100), parameter(1000, 300)]
    monitor = RotationMonitor(torch.optim.SGD(weights, 0.1), keep="sketch")
    assert monitor.nbytes == 2 * 4093 * 4
    assert 225 * monitor.nbytes / 2 < 4e6
    small = RotationMonitor(optimizer_of(network()), keep="sketch", sketch_size=90)
    assert small.nbytes == 4 * (6 * 89 + 89 + 1 + 3 * 89)


def test_16_bit_weights_are_kept_as_they_are(seed: int) -> None:
    params = nn.ParameterList(parameter(9, 40).to(dtype) for dtype in (torch.bfloat16, torch.float16))
    for keep in ("device", "bfloat16"):
        monitor = RotationMonitor(params, keep=keep)
        assert monitor.nbytes == 2 * 2 * 9 * 40
        start = [param.detach().clone() for param in params]
        monitor.record()
        assert monitor.curves.rotation.tolist() == [[0.0, 0.0]] * 2
        walk(params, 0.5)
        monitor.record()
        assert monitor.curves.rotation[-1].tolist() == pytest.approx(rotation_from(start, list(params)), abs=1e-13)


def test_bfloat16_is_as_close_as_it_says(seed: int) -> None:
    """Off by at most 1.96e-3 sin(theta) + 2e-6, at any angle."""
    params = network()
    start = [param.detach().clone() for param in params]
    monitor = RotationMonitor(torch.optim.SGD(params, 0.1), keep="bfloat16")
    for share in (0.0, 1e-3, 0.1, 1.0):
        walk(params, share)
        monitor.record()
        exact = torch.tensor(rotation_from(start, list(params)), dtype=torch.float64)
        sine = (1 - (1 - exact).square()).clamp(min=0).sqrt()
        assert ((monitor.curves.rotation[-1] - exact).abs() <= 1.96e-3 * sine + 2e-6).all()


@pytest.mark.parametrize("block", [1, 64, 2**18])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_copies_brought_over_in_pieces_give_the_same(
    backend: str, block: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are divided and put together again; weights of two types and of odd memory layouts are among them."""
    monkeypatch.setattr(pairs, "BLOCK_ON_CPU", block)
    weights = [torch.randn(6, 20), torch.randn(9, 4).T, torch.randn(5, 3, 2, 2).to(memory_format=torch.channels_last)]
    weights += [torch.randn(4, 30)[:, ::2], torch.randn(3, 7, dtype=torch.float64), torch.empty(0, 4)]
    others = [torch.empty_like(weight, dtype=torch.bfloat16).copy_(torch.randn(weight.shape)) for weight in weights]
    layers = [3, 1, 5, 2, 1, 1]
    dots = pairs.Pairs(weights, others, layers, backend).measure()
    expected = []
    for weight, other, count in zip(weights, others, layers, strict=True):
        for w, v in zip(weight.double().chunk(count), other.double().chunk(count), strict=True):
            expected.append([float((a * b).sum()) for a, b in ((w, w), (w, v), (v, v))])
    assert dots.tolist() == [pytest.approx(row, rel=1e-13, abs=1e-13) for row in expected]


def moved(param: nn.Parameter) -> Tensor:
    return param.data.clone()


def restrided(param: nn.Parameter) -> Tensor:
    return param.data.to(memory_format=torch.channels_last) if param.dim() == 4 else param.data.T.contiguous().T


CHANGES = {
    "moved": moved,
    "restrided": restrided,
    "float64": lambda param: param.data.double(),
    "bfloat16": lambda param: param.data.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("keep", KEEPS)
def test_weights_may_move_and_change_their_type(
    keep: str, change: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their curves go on from the same initial weights, with those before the record too; also in pieces."""
    monkeypatch.setattr(pairs, "BLOCK_ON_CPU", 64)
    params = network()
    start = [param.detach().clone() for param in params]
    per_step = keep != "bfloat16"
    monitor = RotationMonitor(torch.optim.SGD(params, 0.1), keep=keep, per_step=per_step, sketch_size=100_000)
    for _ in range(3):
        before = [param.detach().clone() for param in params]
        walk(params, 0.3)
        for param in params:
            param.data = change(param)
        monitor.record()
        # A sketch of float64 weights is float32.
        exact = {"abs": {"bfloat16": 2e-3, "sketch": 1e-8}.get(keep, 1e-13)}
        assert monitor.curves.rotation[-1].tolist() == pytest.approx(rotation_from(start, list(params)), **exact)
        if per_step:
            turned = (1 - torch.cos(monitor.curves.angle[-1])).tolist()
            assert turned == pytest.approx(rotation_from(before, list(params)), **exact)


@pytest.mark.parametrize("structure", ["all alike", "large columns"])
def test_error_of_a_sketch_is_as_it_says(structure: str, seed: int) -> None:
    """Over 200 layers: no bias, and a standard deviation of (1 - cos^2)/sqrt(size), whatever columns are large.

    Limits are five standard errors, which one seed in a million passes, and the bias of any correlation of 61 pairs.
    """
    layers, length, size = 200, 64 * 40, largest_prime(64)
    scale = torch.ones(length)
    if structure == "large columns":
        scale[::64] = 3.0
    param = nn.Parameter(torch.randn(layers, length) * scale)
    groups = [{"params": [param], "chunks": "all"}]
    options = {"keep": "sketch", "sketch_size": 64, "seed": seed % 1000}
    sketched, exact = RotationMonitor(FusedLayca(groups), **options), RotationMonitor(FusedLayca(groups))
    for share in (0.05, 1.0, 3.0):
        param.data += share * torch.randn(layers, length) * scale
        for monitor in (sketched, exact):
            monitor.record()
        truth = exact.curves.rotation[-1]
        errors = (sketched.curves.rotation[-1] - truth) / ((1 - (1 - truth).square()) / math.sqrt(size))
        assert abs(errors.mean()) < 5 / math.sqrt(layers) + 0.1
        assert abs(errors.square().mean().sqrt() - 1) < 5 / math.sqrt(2 * layers) + 0.05
        assert sketched.curves.norm[-1].tolist() == pytest.approx(exact.curves.norm[-1].tolist(), rel=1e-12)


def test_a_sketch_is_decided_by_its_seed(seed: int) -> None:
    weight = torch.randn(1, 1000).repeat(2, 1)

    def sketch(projection: Projection, name: str, shard: tuple[int, ...]) -> Tensor:
        out = torch.empty(2, projection.length(weight, 2))
        projection.run(weight, [f"{name}[0]", f"{name}[1]"], shard, out)
        return out

    first = sketch(Projection(31, 5), "layer", ())
    torch.randn(3)
    assert torch.equal(sketch(Projection(31, 5), "layer", ()), first)
    others = [
        sketch(Projection(31, 6), "layer", ()),
        sketch(Projection(31, 5), "another", ()),
        sketch(Projection(31, 5), "layer", (1,)),
    ]
    assert not any(torch.equal(other, first) for other in others)
    assert not torch.equal(first[0], first[1]), "each layer has signs of its own"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", KEEPS)
def test_weights_of_no_type_are_touched(keep: str, dtype: torch.dtype, seed: int) -> None:
    """Types that need no conversion before a computation are those that one in place would write to."""
    params = nn.ParameterList(param.to(dtype) for param in network())
    before = [param.detach().clone() for param in params]
    monitor = RotationMonitor(torch.optim.SGD(params, 0.1), keep=keep, per_step=keep != "bfloat16", sketch_size=20)
    monitor.record()
    assert same_bits(list(params), before)
    assert monitor.curves.rotation[1].tolist() == pytest.approx([0.0] * len(SHAPES), abs=2e-6)
