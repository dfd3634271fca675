"""RotationMonitor and diagnostics of DTensors, on two processes: the curves are those of the whole tensors."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from layca_fast import RotationMonitor
from layca_fast.diagnostics import convergence_rate, convergence_rates, gradient_covariance, norm_propagation, snapshot
from layca_fast.monitor.keeping import KEEPS

from ..support import same_bits
from .support import Place, on

WORLD = 2

#: Shape, chunks, placements on a mesh of (1, 2): uneven shards, an empty one, none, shards of the last dimension, of
#: both, and layers that are cut through, or lie on one process alone, in every form that chunks have.
CASES: tuple[tuple[tuple[int, ...], Any, tuple[Placement, ...]], ...] = (
    ((5, 40), 1, (Replicate(), Shard(0))),
    ((1, 300), 1, (Replicate(), Shard(0))),
    ((7, 9), 1, (Replicate(), Replicate())),
    ((6, 50), 3, (Replicate(), Shard(1))),
    ((4, 6, 30), 1, (Shard(0), Shard(2))),
    ((6, 20), 3, (Replicate(), Shard(0))),
    ((6, 20), 2, (Replicate(), Shard(0))),
    ((5, 20), "all", (Replicate(), Shard(0))),
    ((7, 20), (4, 1, 2), (Replicate(), Shard(0))),
    ((7, 20), (4, 3), (Shard(0), Shard(1))),
    ((3, 4, 9), "matrices", (Replicate(), Shard(0))),
    ((2, 3, 4, 9), ("matrices", 2), (Replicate(), Shard(1))),
    ((4, 6), "columns", (Replicate(), Shard(0))),
    ((4, 6), "columns", (Replicate(), Shard(1))),
    ((9, 6), ("columns", (4, 2)), (Replicate(), Shard(1))),
)

#: The layer of the third tensor, which all processes have as a whole.
REPLICA = 2


def optimizer_of(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = zip(params, CASES, strict=True)
    return torch.optim.SGD([{"params": [param], "chunks": chunks} for param, (_, chunks, _) in groups], 0.1)


def watched_twice(keep: str, sketch_size: int) -> tuple[RotationMonitor, RotationMonitor]:
    """A monitor of shards and one of the same weights as they are, through the same three records."""
    mesh = init_device_mesh("cpu", (1, WORLD))
    layouts = [list(placements) for _, _, placements in CASES]
    weights = [torch.randn(shape) for shape, _, _ in CASES]
    sharded = [nn.Parameter(distribute_tensor(w, mesh, layout)) for w, layout in zip(weights, layouts, strict=True)]
    whole = [nn.Parameter(weight.clone()) for weight in weights]
    options: dict[str, Any] = {"keep": keep, "per_step": keep != "bfloat16", "sketch_size": sketch_size}
    monitors = [RotationMonitor(optimizer_of(params), **options) for params in (sharded, whole)]
    for _ in range(3):
        weights = [weight + 0.4 * torch.randn_like(weight) for weight in weights]
        for shards, plain, weight, layout in zip(sharded, whole, weights, layouts, strict=True):
            shards.data.copy_(distribute_tensor(weight, mesh, layout))
            plain.data.copy_(weight)
        for monitor in monitors:
            monitor.record()
    return monitors[0], monitors[1]


@on(WORLD)
def monitors_of_shards_show_whole_layers(place: Place) -> None:
    """Uneven and empty shards, replicas counted once, every ``keep``."""
    for keep in KEEPS:
        # Shards shorter than a sketch are kept whole, so even that must agree.
        sharded, whole = (monitor.curves for monitor in watched_twice(keep, 4096))
        assert sharded.names == whole.names
        for name in ("rotation", "angle", "norm"):
            torch.testing.assert_close(
                getattr(sharded, name), getattr(whole, name), rtol=1e-12, atol=1e-12, equal_nan=True
            )


@on(WORLD)
def each_shard_has_a_sketch_of_its_own(place: Place) -> None:
    """Of 31 numbers: both estimates are within six standard deviations."""
    sharded, whole = (monitor.curves.rotation for monitor in watched_twice("sketch", 31))
    assert (sharded - whole)[1:, [0, 3]].abs().min() > 0, "each process has signs of its own"
    assert (sharded - whole).abs().max() < 2 * 6 / math.sqrt(31)
    assert torch.equal(sharded[:, REPLICA], whole[:, REPLICA]), "what is on every process counts once"


@on(WORLD)
def monitors_under_fsdp2_resume_from_the_state_of_each_rank(place: Place) -> None:
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    plain = copy.deepcopy(model)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizers = [torch.optim.Adam(each.parameters(), 0.05) for each in (model, plain)]
    monitors = [RotationMonitor(each, per_step=True, every=2) for each in (model, plain)]
    assert [monitor.is_sharded for monitor in monitors] == [True, False]
    for monitor, optimizer in zip(monitors, optimizers, strict=True):
        monitor.attach(optimizer)
    inputs = torch.randn(6, 8, 6)
    for step, batch in enumerate(inputs):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            each(batch).square().mean().backward()
            optimizer.step()
        if step == 2:
            torch.save(monitors[0].state_dict(), place.folder / f"monitor-{place.rank}.pt")
    sharded, whole = (monitor.curves for monitor in monitors)
    assert sharded.names == whole.names == ["0.weight", "2.weight"]
    assert sharded.steps == [0, 2, 4, 6]
    torch.testing.assert_close(sharded.rotation, whole.rotation, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sharded.angle, whole.angle, rtol=1e-4, atol=1e-7, equal_nan=True)

    resumed = RotationMonitor(model, per_step=True, every=2)
    resumed.load_state_dict(torch.load(place.folder / f"monitor-{place.rank}.pt", weights_only=True))
    for step in (4, 6):
        resumed.record(step)
    assert same_bits(resumed.curves.rotation[[0, 1, 3]], sharded.rotation[[0, 1, 3]])


@on(WORLD)
def monitors_refuse_partial_sums(place: Place) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    partial = nn.ParameterList([nn.Parameter(DTensor.from_local(torch.ones(3, 3), mesh, [Partial()]))])
    with pytest.raises(ValueError, match=r"parameter '0' .* has placements .*Redistribute it to Shard or Replicate"):
        RotationMonitor(partial)


@on(WORLD)
def diagnostics_of_shards_are_those_of_whole_layers(place: Place) -> None:
    """Or what needs a plain model says so."""
    mesh = init_device_mesh("cpu", (WORLD,))
    weights = [torch.randn(5, 4) for _ in range(3)]
    snapshots = []
    for weight in weights:
        model = nn.Linear(4, 5, bias=False)
        model.load_state_dict({"weight": weight})
        fully_shard(model, mesh=mesh)
        snapshots.append(snapshot(model))
    rates = convergence_rates({0: snapshots[0], 2: snapshots[1]}, snapshots[2])
    assert rates == {"weight": [convergence_rate(*weights, 2)]}
    with pytest.raises(TypeError, match="the weights are a DTensor: pass whole tensors"):
        convergence_rate(model.weight, *weights[1:], 2)
    inputs = torch.randn(3, 4)
    for refused in (
        lambda: norm_propagation(model, inputs, torch.sum),
        lambda: gradient_covariance(model, lambda rows: model(rows).sum(), [inputs, inputs]),
    ):
        with pytest.raises(TypeError, match=r"parameter 'weight' .* is a DTensor: pass a plain model"):
            refused()
