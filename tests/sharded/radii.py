"""Radii that groups give, and layers that join the sphere later, where layers are shared out: as of whole ones."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.nn import Parameter

from layca_fast import FusedLayca, NormDriftError, RotationMonitor

from .layers import check_alike
from .support import Place, counting, draw, give, on, params_of, shared, whole

#: (shape, placement, chunks): cut layers, uneven and empty shards, whole layers.
LAYERS: Sequence[tuple[tuple[int, ...], Placement, int | str]] = (
    ((7, 5), Shard(0), 1),
    ((5, 3, 4), Shard(1), 1),
    ((2, 6), Shard(0), 1),
    ((6, 5), Shard(0), 3),
    ((12, 3), Shard(0), "all"),
    ((5, 4), Shard(0), "all"),
    ((8, 4), Shard(1), "all"),
)


def pair(place: Place, zero: bool = False, **options: Any) -> tuple[FusedLayca, FusedLayca]:
    """An optimizer of whole tensors, and one of their shards."""
    plain, shards = [], []
    for shape, placement, chunks in LAYERS:
        param = Parameter(torch.zeros(shape) if zero else torch.randn(shape))
        plain.append({"params": [param], "chunks": chunks})
        shards.append({"params": [Parameter(shared(param, place.mesh(), [placement]))], "chunks": chunks})
    return FusedLayca(plain, 0.05, **options), FusedLayca(shards, 0.05, **options)


@on(3, exhaustive=(1, 2, 4))
def given_radii_are_those_of_whole_layers(place: Place) -> None:
    seen = []

    def spectral(shape: torch.Size) -> float:
        seen.append(tuple(shape))
        return math.sqrt(shape[0] / shape[1])

    for backend in ("cpu", "torch"):
        plain, sharded = pair(place, radius=spectral, momentum=0.9, backend=backend)
        expected = [(7, 5), (5, 12), (2, 6), (2, 5), (1, 3), (1, 4), (1, 4)]
        for number in range(3):
            grads = draw(params_of(plain))
            give(plain, grads)
            assert number > 0 or seen == expected
            seen.clear()
            give(sharded, grads)
            assert number > 0 or seen == expected
            seen.clear()
        check_alike(plain, sharded)
        for param, (rows, columns) in zip(params_of(sharded), expected, strict=True):
            radius = sharded.state[param]["radius"]
            assert isinstance(radius, DTensor)
            torch.testing.assert_close(whole(radius), torch.full_like(whole(radius), math.sqrt(rows / columns)))


@on(2, exhaustive=(1, 3, 4))
def layers_join_the_sphere_at_the_step_of_whole_ones(place: Place) -> None:
    """All processes agree on which layers wait, shards without elements or gradients among them."""
    seen = set()
    for backend, options in (("cpu", {"momentum": 0.9}), ("torch", {"base": "adam"})):
        plain, sharded = pair(place, zero=True, joins_at=0.6, backend=backend, **options)
        for _ in range(5):
            grads = draw(params_of(plain))
            give(plain, grads)
            give(sharded, grads)
            check_alike(plain, sharded)
            seen.update((plain.state[param]["radius"] > 0).all().item() for param in params_of(plain))
        for param, theirs in zip(params_of(sharded), params_of(plain), strict=True):
            assert torch.equal(whole(sharded.state[param]["radius"]) < 0, plain.state[theirs]["radius"] < 0)
    assert seen == {False, True}


@on(3, exhaustive=(2,))
def sixteen_bits_and_missing_gradients_join_alike(place: Place) -> None:
    whole_param = Parameter(torch.zeros(7, 5, dtype=torch.bfloat16))
    shard = Parameter(shared(whole_param, place.mesh(), [Shard(0)]))
    plain, sharded = (FusedLayca([param], 0.015, joins_at=0.5) for param in (whole_param, shard))
    # Steps of about 0.2 that point one way more than not: the first cannot reach 0.5, and six are sure to.
    drift = 2 * torch.randn(7, 5).sign()
    for number in range(6):
        grad = (drift + torch.randn(7, 5)).bfloat16()
        # The last process has no gradient in every second step: what it has counts as zeros.
        lacks = number % 2 == 1
        local = shared(grad, place.mesh(), [Shard(0)])
        rows = [piece.shape[0] for piece in grad.chunk(place.world)]
        if lacks:
            grad[sum(rows[: place.world - 1]) :] = 0
        whole_param.grad = grad
        shard.grad = None if lacks and place.rank == place.world - 1 else local
        plain.step()
        sharded.step()
        assert number > 0 or float(plain.state[whole_param]["radius"]) < 0
    assert float(plain.state[whole_param]["radius"]) > 0
    torch.testing.assert_close(
        whole(sharded.state[shard]["radius"]), plain.state[whole_param]["radius"], rtol=1e-5, atol=0
    )


@on(3, exhaustive=(1, 2, 4))
def a_norm_that_one_process_has_changed_is_found_by_all(place: Place) -> None:
    """By the names of its layers, whichever lie here; and as of whole layers."""
    options = {"momentum": 0.9, "backend": "cpu"}
    plain, sharded = pair(place, **options)
    with pytest.raises(RuntimeError, match="no step was taken yet"):
        sharded.check_norms()
    for _ in range(2):
        grads = draw(params_of(plain))
        give(plain, grads)
        give(sharded, grads)
        for at in ("step", "now"):
            with counting() as sums:
                assert abs(sharded.check_norms(at=at).worst()[1]) < 1e-6
            assert len(sums) == (place.world > 1)
    # In the first row, which one process has, or each a part of.
    for ours, theirs in zip(params_of(sharded), params_of(plain), strict=True):
        with torch.no_grad():
            whole_one = theirs.detach().clone()
            whole_one[0].mul_(0.5)
            theirs.copy_(whole_one)
            ours.copy_(shared(whole_one, ours.device_mesh, ours.placements))
    for at in ("now", "step"):
        expected, found = plain.check_norms(at=at), sharded.check_norms(at=at)
        assert list(found) == list(expected)
        for name, drift in expected.items():
            torch.testing.assert_close(found[name], drift, rtol=1e-5, atol=1e-6)
        assert sorted(found.above(1e-3)) == sorted(expected.above(1e-3))
        with pytest.raises(NormDriftError, match=r"layers have not the norm of their radius.*\[0\]"):
            sharded.check_norms(above=1e-3, at=at)
        if at == "now":
            grads = draw(params_of(plain))
            give(plain, grads)
            give(sharded, grads)


@on(2, exhaustive=(3,))
def a_monitor_raises_on_every_process_at_the_step(place: Place) -> None:
    weight = shared(torch.randn(5, 4), place.mesh(), [Shard(0)])
    optimizer = FusedLayca([("weight", Parameter(weight))], 0.1)
    monitor = RotationMonitor(optimizer, check_norms=1e-3)
    for number in range(3):
        give(optimizer, [torch.randn(5, 4)])
        if number < 2:
            monitor.record()
        if number == 1 and place.rank == 0:
            with torch.no_grad():
                params_of(optimizer)[0].to_local().mul_(0.5)
    with pytest.raises(NormDriftError, match="weight -"):
        monitor.record()
