"""Matrices that lie on several processes, whose directions need the whole of them."""

import copy
from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter

from layca_fast import FusedLayca, layer_groups

from .support import Place, counting, draw, expect, give, off, on, params_of, shared, whole
from .travelling import LONG, WEIGHTS, counting_all_to_alls, counting_matrices, everywhere, run, twins


def model_of() -> nn.Sequential:
    """Odd sizes, so that shards are uneven, and empty on the last processes."""
    return nn.Sequential(nn.Linear(7, 10), nn.Tanh(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 6))


@on(3, exhaustive=(1, 2, 4))
def muon_under_fsdp2_is_that_of_one_process(place: Place) -> None:
    """On FSDP's gradients, means that it rounds: of nearly singular momenta Muon makes steps of such a rounding."""
    torch.manual_seed(place.seed)
    plain = model_of()
    model = copy.deepcopy(plain)
    for module in (model[0], model):
        fully_shard(module)
    for rule in ("layca", "hyperball", None):
        options = {"rotate": False} if rule is None else {"rule": rule}
        pairs = []
        for each in (plain, model):
            groups = layer_groups(each, 0.05, base="muon", others_base="adam", others_lr=0.01)
            for group in groups:
                group.update(options if group.get("base", "muon") == "muon" else {})
            pairs.append((each, FusedLayca(groups)))
        assert any(group["base"] == "muon" for group in pairs[1][1].param_groups)
        for _ in range(LONG):
            inputs, targets = torch.randn(16, 7), torch.randn(16, 6)
            for each, optimizer in pairs:
                optimizer.zero_grad()
                nn.functional.mse_loss(each(inputs), targets).backward()
            for one, other in zip(model.parameters(), plain.parameters(), strict=True):
                mean = whole(one.grad)
                assert off([other.grad], [mean]) < 1e-5
                other.grad = mean
            for _, optimizer in pairs:
                optimizer.step()
        assert off(list(model.parameters()), list(plain.parameters())) < 1e-5
        # The next rule begins with the same weights.
        with torch.no_grad():
            for one, other in zip(model.parameters(), plain.parameters(), strict=True):
                other.copy_(whole(one))


@on(3, exhaustive=(2, 4))
def muon_along_either_dimension_is_that_of_whole_matrices(place: Place) -> None:
    """With as many collectives as there may be, and each matrix made once."""
    backwards = DeviceMesh("cpu", list(reversed(range(place.world))))
    for placement, mesh in ((Shard(0), place.mesh()), (Shard(1), place.mesh()), (Shard(0), backwards)):
        for backend in ("cpu", "torch") if place.world == 2 else ("cpu",):
            plain, sharded = twins(mesh, [placement], backend=backend)
            run((plain, sharded))
            for one, other in zip(params_of(sharded), params_of(plain), strict=True):
                # Not of gathered tensors: torch puts those of a mesh backwards together in another order.
                expected = shared(other, mesh, [placement])._local_tensor
                torch.testing.assert_close(
                    one._local_tensor, expected, rtol=0, atol=1e-5 * float(other.detach().norm())
                )
    with counting_all_to_alls() as sent, counting_matrices() as made, counting() as sums:
        give(sharded, draw(params_of(sharded)))
    assert (len(sent), len(sums)) == (2, 1)
    counts = everywhere(len(made))
    assert sum(counts) == len(WEIGHTS)
    assert min(counts) >= 1


def two_dimensions(mesh: DeviceMesh) -> Sequence[Sequence[Placement]]:
    """Both dimensions of a mesh in every order, one of them, and none."""
    over_tensor_parallel = _StridedShard(0, split_factor=mesh.size(1))
    return (
        (Shard(0), Shard(0)),
        (over_tensor_parallel, Shard(0)),
        (Shard(0), Shard(1)),
        (Shard(1), Shard(0)),
        (Shard(1), Shard(1)),
        (Replicate(), Shard(0)),
        (Shard(1), Replicate()),
        (Replicate(), Replicate()),
    )


@on(4, exhaustive=(6,))
def muon_on_a_mesh_of_two_dimensions_is_that_of_whole_matrices(place: Place) -> None:
    """Two all-to-alls along each dimension that shards, however many tensors it shards how."""
    mesh = init_device_mesh("cpu", (2, place.world // 2))
    for placements in two_dimensions(mesh)[:: 1 if place.world == 4 else 3]:
        plain, sharded = twins(mesh, placements)
        run((plain, sharded))
        assert off(params_of(sharded), params_of(plain)) < 1e-5
        with counting_all_to_alls() as sent, counting_matrices() as made:
            give(sharded, draw(params_of(sharded)))
        replicas = prod(mesh.size(i) for i, each in enumerate(placements) if each.is_replicate())
        assert sum(everywhere(len(made))) == replicas * len(WEIGHTS)
        assert len(sent) == 2 * sum(not each.is_replicate() for each in placements)
        # Replicas have the same bits.
        for i, each in enumerate(placements):
            if each.is_replicate():
                for param in params_of(sharded):
                    local = param._local_tensor.detach().contiguous()
                    others = [torch.empty_like(local) for _ in range(mesh.size(i))]
                    dist.all_gather(others, local, group=mesh.get_group(i))
                    assert all(torch.equal(other, local) for other in others)
    # All of them in one optimizer.
    weights = [torch.randn(8, 12) for _ in two_dimensions(mesh)]
    whole_ones = [Parameter(weight.clone()) for weight in weights]
    params = [Parameter(shared(weight, mesh, each)) for weight, each in zip(weights, two_dimensions(mesh), strict=True)]
    mixed = FusedLayca(whole_ones, 0.05, base="muon"), FusedLayca(params, 0.05, base="muon")
    run(mixed)
    assert off(params, whole_ones) < 1e-5
    with counting_all_to_alls() as sent:
        give(mixed[1], draw(params))
    assert len(sent) == 4


@on(4)
def muon_under_fsdp2_over_tensor_parallel_is_that_of_one_process(place: Place) -> None:
    torch.manual_seed(place.seed)
    plain = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 8), nn.Linear(8, 2))
    model = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    assert any(type(each).__name__ == "_StridedShard" for each in model[0].weight.placements)
    pairs = []
    for each in (plain, model):
        matrices = [param for param in each.parameters() if param.dim() > 1]
        others = [param for param in each.parameters() if param.dim() < 2]
        groups = [{"params": matrices, "base": "muon"}, {"params": others, "base": "adam"}]
        pairs.append((each, FusedLayca(groups, 0.05)))
    for _ in range(LONG):
        inputs, targets = torch.randn(16, 7), torch.randn(16, 2)
        for each, optimizer in pairs:
            optimizer.zero_grad()
            nn.functional.mse_loss(each(inputs), targets).backward()
            with counting_all_to_alls() as sent:
                optimizer.step()
    assert off(list(model.parameters()), list(plain.parameters())) < 1e-5
    assert len(sent) == 4


@on(2, 3)
def a_direction_of_which_some_lack_gradients_is_that_of_zeros_there(place: Place) -> None:
    """Where a process has no gradient its part of the momentum stays, takes no part, and is only scaled."""
    for options in ({}, {"rotate": False, "weight_decay": 0.1}):
        plain, sharded = twins(place.mesh(), [Shard(0)], [((6, 5), options)])
        run((plain, sharded), 3)
        (param,), (one,) = params_of(sharded), params_of(plain)
        grads = draw([one])
        rows = -(-6 // place.world)
        momentum, before = whole(sharded.state[param]["momentum_buffer"]).clone(), whole(param).clone()
        param.grad = None if place.rank == 0 else shared(grads[0], param.device_mesh, param.placements)
        sharded.step()
        now, after = whole(sharded.state[param]["momentum_buffer"]), whole(param)
        assert torch.equal(now[:rows], momentum[:rows])
        assert not torch.equal(now[rows:], momentum[rows:])
        assert not torch.equal(after[rows:], before[rows:])
        if options:
            assert torch.equal(after[:rows], before[:rows])
        else:
            ratios = after[:rows] / before[:rows]
            torch.testing.assert_close(ratios, ratios[:1, :1].expand_as(ratios), rtol=1e-5, atol=0)
        # And nowhere: no layer moves.
        param.grad, before = None, whole(param).clone()
        sharded.step()
        assert torch.equal(whole(param), before)


@on(2, 3)
def at_lr_0_shards_keep_every_bit_and_momenta_move(place: Place) -> None:
    _, sharded = twins(place.mesh(), [Shard(0)])
    run((sharded,), 2)
    before = [whole(param).clone() for param in params_of(sharded)]
    momenta = [whole(sharded.state[param]["momentum_buffer"]).clone() for param in params_of(sharded)]
    for group in sharded.param_groups:
        group["lr"] = 0.0
    run((sharded,), 1)
    assert all(torch.equal(whole(param), old) for param, old in zip(params_of(sharded), before, strict=True))
    for param, old in zip(params_of(sharded), momenta, strict=True):
        assert not torch.equal(whole(sharded.state[param]["momentum_buffer"]), old)


@on(2, 3)
def options_of_directions_may_change_in_a_run(place: Place) -> None:
    """Also the type that matrices travel in."""
    plain, sharded = twins(place.mesh(), [Shard(0)])
    run((plain, sharded), 2)
    for change in ({"ns_steps": 4}, {"ns_dtype": torch.bfloat16}, {"ns_dtype": None, "adjust_lr": "match_rms_adamw"}):
        for optimizer in (plain, sharded):
            for group in optimizer.param_groups:
                group.update(change)
        run((plain, sharded), 2)
        assert off(params_of(sharded), params_of(plain)) < (1e-2 if change.get("ns_dtype") else 1e-5)
        if change.get("ns_dtype") is not None:
            # Rounding to it differs in the last bits of the norms.
            with torch.no_grad():
                for one, other in zip(params_of(sharded), params_of(plain), strict=True):
                    other.copy_(whole(one))
                    plain.state[other]["momentum_buffer"].copy_(whole(sharded.state[one]["momentum_buffer"]))


@on(2)
def learned_radii_of_directed_shards_are_those_of_whole_matrices(place: Place) -> None:
    plain, sharded = twins(place.mesh(), [Shard(0)], radius="learned", radius_lr=2.0)
    run((plain, sharded), 5)
    assert off(params_of(sharded), params_of(plain)) < 1e-5


@on(2)
def shards_that_lie_otherwise_than_their_placements_say_are_refused(place: Place) -> None:
    """Before anything is modified: what would be put together of them is another matrix."""
    local = torch.randn(2 + place.rank, 4)
    mesh, lies = place.mesh(), [Shard(0)]
    param = Parameter(DTensor.from_local(local, mesh, lies, run_check=False, shape=torch.Size((5, 4)), stride=(4, 1)))
    optimizer = FusedLayca([param], 0.1, base="muon")
    grad = torch.randn_like(local)
    param.grad = DTensor.from_local(grad, mesh, lies, run_check=False, shape=torch.Size((5, 4)), stride=(4, 1))
    before = local.clone()
    expect(ValueError, "distribute_tensor", optimizer.step)
    assert torch.equal(local, before)
    assert not optimizer.state
