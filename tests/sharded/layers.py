"""What must hold of layers that are shared out, tensor by tensor: each case asserts on every process of a world."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.commands.cases import BASE_OPTIONS
from layca_fast.formulas.options import find_base

from .support import STEPS, Place, counting, draw, expect, give, off, on, params_of, shared, whole

#: (shape, placement, options): uneven and empty shards, cut chunks, whole chunks, every rule.
LAYERS: Sequence[tuple[tuple[int, ...], Placement, dict[str, Any]]] = (
    ((7, 5), Shard(0), {}),
    ((5, 3, 4), Shard(1), {"radius": "current", "maximize": True}),
    ((1, 9), Shard(0), {"rule": "hyperball", "rotate": True}),
    ((6, 5), Shard(0), {"chunks": 3}),
    ((12, 3), Shard(0), {"chunks": 12}),
    ((8, 4), Shard(1), {"chunks": "all", "rule": "hyperball"}),
    ((5, 4), Shard(0), {"chunks": "all", "lr": 0.07}),
    ((13,), Shard(0), {"weight_decay": 0.1}),
    ((2,), Shard(0), {}),
    ((3, 4), Replicate(), {}),
)

#: The same of bases that direct matrices: uneven and empty shards, cut chunks, experts by expert and each cut, every
#: rule, and what does not rotate.
MATRICES: Sequence[tuple[tuple[int, ...], Placement, dict[str, Any]]] = (
    ((7, 5), Shard(0), {}),
    ((5, 3, 4), Shard(1), {"radius": "current", "maximize": True}),
    ((1, 9), Shard(0), {"rule": "hyperball", "rotate": True}),
    ((6, 5), Shard(0), {"chunks": 3}),
    ((12, 3, 4), Shard(0), {"chunks": 12}),
    ((4, 6, 5), Shard(1), {"chunks": "all", "rule": "hyperball"}),
    ((5, 4, 3), Shard(0), {"chunks": "all", "lr": 0.07}),
    ((4, 8), Shard(1), {"chunks": 2}),
    ((13, 3), Shard(0), {"rotate": False, "weight_decay": 0.1}),
    ((2, 6), Shard(0), {"rotate": False}),
    ((3, 4), Replicate(), {}),
)


def layers_for(options: Mapping[str, Any]) -> Sequence[tuple[tuple[int, ...], Placement, dict[str, Any]]]:
    """What a base with these options takes."""
    base = find_base(options.get("base", "sgd"))
    return LAYERS if base.formula({**base.options, **options}).direct is None else MATRICES


def optimizers(mesh: DeviceMesh, **options: Any) -> tuple[FusedLayca, FusedLayca]:
    """One on the same whole tensors everywhere, one on their shards, and a plain tensor in both."""
    plain, shards = [], []
    dtype = options.pop("dtype", torch.float32)
    for shape, placement, own in layers_for(options):
        param = Parameter(torch.randn(shape, dtype=dtype))
        plain.append({"params": [param], **own})
        shards.append({"params": [Parameter(shared(param, mesh, [placement]))], **own})
    ignored = torch.randn(4, 4, dtype=dtype)
    for groups in (plain, shards):
        groups.append({"params": [Parameter(ignored.clone())]})
    return FusedLayca(plain, 0.02, **options), FusedLayca(shards, 0.02, **options)


def check_alike(whole_one: FusedLayca, sharded: FusedLayca) -> None:
    """Weights, and states by key, shape, placement and value."""
    assert off(params_of(sharded), params_of(whole_one)) < 1e-6
    for theirs, ours in zip(params_of(whole_one), params_of(sharded), strict=True):
        expected, found = whole_one.state[theirs], sharded.state[ours]
        assert list(found) == list(expected)
        for name, value in found.items():
            if name == "step" or not isinstance(ours, DTensor):
                continue
            assert isinstance(value, DTensor)
            assert value.shape == expected[name].shape
            if name != "radius":
                assert value.placements == ours.placements
            elif not all(each.is_replicate() for each in value.placements):
                # As what holds the layers is: with rows or, where columns are cut, with these.
                assert list(value.placements) == [Shard(0)]
                assert len(value) > 1
            if name != "remainder":
                torch.testing.assert_close(whole(value), expected[name], rtol=1e-5, atol=1e-6)


@on(2, exhaustive=(1, 3, 4))
def every_base_takes_the_steps_of_the_whole_layers(place: Place) -> None:
    mesh = place.mesh()
    for number, base in enumerate(BASE_OPTIONS):
        for backend in ("cpu", "torch") if number % 3 == 0 or base["base"] == "muon" else ("cpu",):
            plain, sharded = optimizers(mesh, backend=backend, **base)
            before = [whole(param).clone() for param in params_of(sharded)]
            for step in range(STEPS):
                grads = draw(params_of(plain))
                give(plain, grads)
                give(sharded, grads)
                if step == 0:  # of signs alone, later ones may lead back
                    assert all(bool((whole(p) != old).any()) for p, old in zip(params_of(sharded), before, strict=True))
            check_alike(plain, sharded)


@on(2, exhaustive=(3,))
def sixteen_bits_take_the_steps_of_the_whole_layers(place: Place) -> None:
    bases = ({"momentum": 0.9}, {"base": "muon"}, {"base": "muon", "ns_dtype": torch.bfloat16})
    for dtype, base in product((torch.bfloat16, torch.float16), bases):
        plain, sharded = optimizers(place.mesh(), dtype=dtype, **base)
        for _ in range(STEPS):
            grads = [grad.to(dtype) for grad in draw(params_of(plain))]
            give(plain, grads)
            give(sharded, grads)
        ours = [sharded.effective_weight(param) for param in params_of(sharded)]
        theirs = [plain.effective_weight(param) for param in params_of(plain)]
        assert all(weight.dtype == torch.float32 for weight in ours)
        # Norms of what travels in bfloat16 are those of rounded numbers: directions differ in its last bit, which the
        # largest rate of all layers turns by.
        assert off(ours, theirs) < (STEPS * 0.07 * 2**-7 if "ns_dtype" in base else 1e-6)


@on(4)
def replicas_of_shards_keep_the_same_bits(place: Place) -> None:
    """Hybrid sharding: a mesh of two dimensions of which only one shards."""
    mesh = init_device_mesh("cpu", (2, 2))
    weight = torch.randn(6, 5)
    whole_one = Parameter(weight.clone())
    param = Parameter(shared(weight, mesh, [Replicate(), Shard(0)]))
    plain, sharded = FusedLayca([whole_one], 0.02, momentum=0.9), FusedLayca([param], 0.02, momentum=0.9)
    for _ in range(STEPS):
        grads = draw([weight])
        give(plain, grads)
        with counting() as seen:
            give(sharded, grads)
    assert len(seen) == 1
    assert off([param], [whole_one]) < 1e-6
    local = param.to_local().detach().clone()
    others = [torch.empty_like(local) for _ in range(2)]
    dist.all_gather(others, local, group=mesh.get_group(0))
    assert all(torch.equal(other, local) for other in others)


@on(2, 3)
def one_sum_per_step_of_24_bytes_per_layer(place: Place) -> None:
    _, sharded = optimizers(place.mesh(), momentum=0.9)
    give(sharded, draw(params_of(sharded)))
    with counting() as seen:
        give(sharded, draw(params_of(sharded)))
    # Chunks that a process has whole are not summed, nor what does not rotate, nor replicas, nor plain tensors. With
    # two processes 12 chunks lie whole on them; with three these and the three of another tensor do.
    layers = 1 + 1 + 1 + (3 if place.world == 2 else 0) + 8
    assert [tensor.numel() * tensor.element_size() for tensor in seen] == [24 * layers]


@on(2)
def a_shard_without_a_gradient_takes_no_step_of_its_own(place: Place) -> None:
    mesh = place.mesh()
    for backend in ("cpu", "torch"):
        for base in ({"momentum": 0.9}, {"base": "adam"}, {"base": "muon"}):
            weight = torch.randn(6, 5)
            param = Parameter(shared(weight, mesh, [Shard(0)]))
            optimizer = FusedLayca([param], 0.1, backend=backend, **base)
            give(optimizer, draw([param]))
            name = next(name for name in optimizer.state[param] if name not in ("radius", "step"))
            state = optimizer.state[param][name].to_local().clone()
            before = whole(param).double()
            param.grad = shared(torch.randn(6, 5), mesh, [Shard(0)])
            if place.rank == 1:
                param.grad = None
            optimizer.step()
            after = whole(param).double()
            if place.rank == 1:
                assert torch.equal(optimizer.state[param][name].to_local(), state)
            torch.testing.assert_close(after.norm(), weight.double().norm(), rtol=1e-6, atol=0)
            # The rows of the process without a gradient are only scaled.
            cosine = nn.functional.cosine_similarity(after[3:].flatten(), before[3:].flatten(), 0)
            assert float(cosine) > 1 - 1e-12
            angle = torch.acos((after * before).sum() / after.norm() / before.norm())
            torch.testing.assert_close(angle, torch.tensor(0.1, dtype=angle.dtype).atan(), rtol=1e-4, atol=0)


@on(2, 3)
def a_layer_without_a_gradient_anywhere_stays(place: Place) -> None:
    for base in ({"momentum": 0.9}, {"base": "muon"}):
        _, sharded = optimizers(place.mesh(), **base)
        for param in params_of(sharded)[1:]:
            param.grad = None
        first = params_of(sharded)[0]
        first.grad = shared(torch.randn(first.shape), first.device_mesh, first.placements)
        before = [whole(param).clone() for param in params_of(sharded)]
        with counting() as seen:
            sharded.step()
        assert len(seen) == 3 if place.world == 2 else 2  # two of them ask for layers of zeros
        after = [whole(param) for param in params_of(sharded)]
        same = [bool((a == b).all()) for a, b in zip(after, before, strict=True)]
        assert same == [False] + [True] * (len(after) - 1)
        # Every trainable DTensor has its state, so that a checkpoint has the same keys everywhere.
        assert all(len(sharded.state[param]) > 0 for param in params_of(sharded)[:-1])
        assert not sharded.state[params_of(sharded)[-1]]


@on(2)
def what_is_wrong_is_said_before_anything_moves(place: Place) -> None:
    mesh = place.mesh()
    weights = torch.randn(4, 4)
    good = Parameter(shared(weights, mesh, [Shard(0)]))
    other = Parameter(shared(weights, mesh, [Shard(0)]))
    optimizer = FusedLayca([good, other], 0.1)
    good.grad = shared(weights, mesh, [Shard(0)])
    other.grad = shared(weights, init_device_mesh("cpu", (1, 2)), [Replicate(), Shard(0)])
    expect(ValueError, "redistribute the gradient", optimizer.step)
    assert torch.equal(whole(good), weights)
    assert not optimizer.state[good]
    partial = Parameter(DTensor.from_local(weights, mesh, [Partial()]))
    expect(ValueError, "Redistribute it to Shard or Replicate first", lambda: FusedLayca([partial], 0.1))


@on(2, exhaustive=(3,))
def a_gradient_may_be_placed_otherwise_than_its_parameter(place: Place) -> None:
    """As tensor parallel leaves some; the parameter must not, nor may its states change their placement."""
    mesh = place.mesh()
    for backend, base in product(("cpu", "torch"), ({"momentum": 0.9}, {"base": "muon"})):
        plain, sharded = optimizers(mesh, backend=backend, **base)
        for placement in (Replicate(), Partial(), Shard(1)):
            grads = draw(params_of(plain))
            for one, other, grad in zip(params_of(plain), params_of(sharded), grads, strict=True):
                one.grad = other.grad = grad
                if isinstance(other, DTensor) and (placement != Shard(1) or grad.dim() > 1):
                    lies = grad / place.world if placement == Partial() else grad
                    is_whole = not isinstance(placement, Shard)
                    other.grad = (
                        DTensor.from_local(lies, mesh, [placement]) if is_whole else shared(grad, mesh, [Shard(1)])
                    )
                elif isinstance(other, DTensor):
                    other.grad = shared(grad, mesh, other.placements)
            plain.step()
            sharded.step()
        check_alike(plain, sharded)


@on(2)
def a_step_nearly_along_the_weights_turns_by_the_angle(place: Place) -> None:
    """What the dots cannot resolve is measured again where a layer is whole, which no process could do alone."""
    mesh = place.mesh()
    for backend in ("cpu", "torch"):
        weights = torch.randn(8, 50, dtype=torch.float64)
        across = torch.randn(8, 50, dtype=torch.float64)
        across -= (across * weights).sum() / (weights * weights).sum() * weights
        grad = weights + 1e-3 * across / across.norm() * weights.norm()
        param = Parameter(shared(weights, mesh, [Shard(0)]))
        optimizer = FusedLayca([param], 0.1, backend=backend)
        give(optimizer, [grad])
        after = whole(param)
        cosine = (after * weights).sum() / after.norm() / weights.norm()
        torch.testing.assert_close(torch.acos(cosine), torch.tensor(0.1, dtype=torch.float64).atan(), rtol=1e-7, atol=0)


@on(2, 3)
def telemetry_is_the_same_on_every_process(place: Place) -> None:
    for base in ("sgd", "muon"):
        plain, sharded = optimizers(place.mesh(), base=base)
        for _ in range(2):
            grads = draw(params_of(plain))
            give(plain, grads)
            give(sharded, grads)
        theirs, ours = plain.rotation_stats(), sharded.rotation_stats()
        for one, other in zip(params_of(plain), params_of(sharded), strict=True):
            if one.dim() < 2 or len(ours[other].angle) != len(theirs[one].angle):
                continue  # whole chunks: those of this process only
            for name in ("angle", "norm", "radius", "step_norm"):
                expected = getattr(theirs[one], name)
                torch.testing.assert_close(getattr(ours[other], name), expected, rtol=1e-5, atol=1e-7)
