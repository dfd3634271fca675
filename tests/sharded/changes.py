"""What differs between processes or changes in the middle of a run must neither hang nor go wrong."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.nn import Parameter

from layca_fast import FusedLayca, layer_groups
from layca_fast.state.slot import Slot

from .support import STEPS, Place, draw, expect, give, network, off, on, params_of, shared, whole


@on(2)
def a_shard_that_is_unfrozen_is_summed_with_or_without_a_gradient(place: Place) -> None:
    mesh = place.mesh()
    params = [Parameter(shared(torch.randn(6, 4), mesh, [Shard(0)])) for _ in range(2)]
    params[1].requires_grad_(False)
    optimizer = FusedLayca(params, 0.1, momentum=0.9)
    params[0].grad = shared(torch.randn(6, 4), mesh, [Shard(0)])
    optimizer.step()
    assert not optimizer.state[params[1]]
    params[1].requires_grad_(True)
    before = [whole(param).clone() for param in params]
    grad = shared(torch.randn(6, 4), mesh, [Shard(0)])
    params[1].grad = grad if place.rank == 0 else None
    optimizer.step()
    assert all(bool((whole(param) != old).any()) for param, old in zip(params, before, strict=True))
    assert off([whole(param).norm().reshape(1) for param in params], [old.norm().reshape(1) for old in before]) < 1e-6


@on(2)
def chunks_that_change_need_new_radii(place: Place) -> None:
    """Also where the radii of all are as many as those that now lie here."""
    param = Parameter(shared(torch.randn(8, 4), place.mesh(), [Shard(0)]))
    optimizer = FusedLayca([param], 0.1, chunks=2)
    give(optimizer, draw([param]))
    optimizer.param_groups[0]["chunks"] = 4
    before = whole(param).clone()
    expect(ValueError, "reset_radius", lambda: give(optimizer, draw([param])))
    assert torch.equal(whole(param), before)
    optimizer.reset_radius()
    give(optimizer, draw([param]))
    torch.testing.assert_close(whole(param).view(4, -1).norm(dim=1), before.view(4, -1).norm(dim=1))


@on(2)
def shards_may_move_in_memory(place: Place) -> None:
    """Cut into chunks, too, which are views of what was there."""
    weight = torch.randn(6, 4)
    param, whole_one = Parameter(shared(weight, place.mesh(), [Shard(0)])), Parameter(weight.clone())
    plain, sharded = (FusedLayca([each], 0.05, momentum=0.9, chunks=3) for each in (whole_one, param))
    for moved in ("nothing", "weights", "state"):
        buffer = sharded.state[param]["momentum_buffer"] if moved == "state" else param
        if moved != "nothing":
            buffer._local_tensor.data = buffer._local_tensor.detach().clone()
        grads = draw([weight])
        give(plain, grads)
        give(sharded, grads)
        assert off([param], [whole_one]) < 1e-6
        assert off([sharded.state[param]["momentum_buffer"]], [plain.state[whole_one]["momentum_buffer"]]) < 1e-6


@on(6)
def processes_without_layers_sum_the_others_in_the_same_order(place: Place) -> None:
    """Rows of a mesh that have none of a tensor's layers must not take its groups out of turn."""
    mesh = init_device_mesh("cpu", (3, 2))
    groups = [({"chunks": "all"}, torch.randn(2, 6)), ({}, torch.randn(6, 6))]
    plain = FusedLayca([{"params": [Parameter(weight.clone())], **own} for own, weight in groups], 0.05)
    shards = [{"params": [Parameter(shared(weight, mesh, [Shard(0), Shard(1)]))], **own} for own, weight in groups]
    sharded = FusedLayca(shards, 0.05)
    for _ in range(STEPS):
        grads = draw(params_of(plain))
        give(plain, grads)
        give(sharded, grads)
    assert off(params_of(sharded), params_of(plain)) < 1e-6
    layers = [len(stats.angle) for stats in sharded.rotation_stats().values()]
    assert layers == [1 if mesh.get_coordinate()[0] < 2 else 0, 1]


@on(2)
def a_mesh_may_hold_one_of_the_processes_only(place: Place) -> None:
    meshes = DeviceMesh("cpu", [0]), place.mesh()
    params = [Parameter(shared(torch.randn(4, 4), mesh, [Shard(0)])) for mesh in meshes]
    optimizer = FusedLayca(params, 0.1, momentum=0.9)
    before = [param._local_tensor.clone() for param in params]
    for _ in range(3):
        give(optimizer, draw(params))
    moved = [not torch.equal(param._local_tensor, old) for param, old in zip(params, before, strict=True)]
    assert moved == [place.rank == 0, True]
    assert [len(optimizer.state[param]) > 0 for param in params] == moved


@on(2)
def gradients_that_are_shared_out_as_before_are_not_looked_at_one_by_one(place: Place) -> None:
    """As FSDP2 hands them over; anything else is noticed."""
    torch.manual_seed(place.seed)
    model = network()
    fully_shard(model)
    weights = [whole(param).clone() for param in model.parameters()]
    whole_ones = [Parameter(weight) for weight in weights]
    plain, sharded = (FusedLayca(each, 0.02, base="adam") for each in (whole_ones, model.parameters()))
    looked = []
    look = Slot.gradient
    Slot.gradient = lambda slot, dtype: looked.append(slot) or look(slot, dtype)
    try:
        for step in range(5):
            sharded.zero_grad()
            model(torch.randn(4, 7)).square().sum().backward()
            for one, other in zip(whole_ones, model.parameters(), strict=True):
                if step == 3:
                    other.grad = other.grad.redistribute(placements=[Replicate()])
                one.grad = whole(other.grad)
            looked.clear()
            plain.step()
            sharded.step()
            # One of the batches has a shard without elements.
            assert (len(looked) < len(weights)) == (step not in (0, 3, 4))
    finally:
        Slot.gradient = look
    assert off(list(model.parameters()), whole_ones) < 1e-6
    # Whoever builds gradients by hand may forget to share one out.
    weight = Parameter(shared(torch.randn(4, 4), place.mesh(), [Shard(0)]))
    optimizer = FusedLayca([weight], 0.1)
    weight.grad = shared(torch.randn(4, 4), place.mesh(), [Shard(0)])
    optimizer.step()
    optimizer.step()
    weight.grad = torch.randn(4, 4)
    before = whole(weight).clone()
    expect(TypeError, "make them alike", optimizer.step)
    assert torch.equal(whole(weight), before)


@on(2, 3)
def layers_of_zeros_are_agreed_upon(place: Place) -> None:
    mesh = place.mesh()
    weights = torch.randn(6, 4)
    weights[:3] = 0.0
    # All zeros on the first process, but not everywhere.
    param = Parameter(shared(weights, mesh, [Shard(0)]))
    optimizer = FusedLayca([param], 0.1)
    give(optimizer, draw([param]))
    torch.testing.assert_close(whole(param).norm(), weights.norm())
    # Beside muon's.
    matrix, zeros = (Parameter(shared(each, mesh, [Shard(0)])) for each in (weights, torch.zeros(6, 4)))
    optimizer = FusedLayca([matrix], 0.1, base="muon")
    give(optimizer, draw([matrix]))
    torch.testing.assert_close(whole(matrix).norm(), weights.norm())
    optimizer = FusedLayca([zeros], 0.1, base="muon")
    expect(ValueError, "all weights of a layer are zero", lambda: give(optimizer, draw([zeros])))
    # One of the layers, which lies on one process: all of them raise.
    chunked = Parameter(shared(weights, mesh, [Shard(0)]))
    optimizer = FusedLayca([chunked], 0.1, chunks="all")
    expect(ValueError, "all weights of a layer are zero", lambda: give(optimizer, draw([chunked])))
    # At lr = 0 that does not matter yet, and a process may go over its tensors alone.
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.add_param_group({"params": [Parameter(torch.randn(3))], "lr": 0.1})
    for own in range(2):
        chunked.grad = shared(torch.randn(6, 4), mesh, [Shard(0)])
        params_of(optimizer)[1].grad = torch.randn(3) if own and place.rank == 0 else None
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    expect(ValueError, "all weights of a layer are zero", lambda: give(optimizer, draw(params_of(optimizer))))
    assert torch.equal(whole(chunked), weights)
    with torch.no_grad():
        chunked.fill_(1.0)
    give(optimizer, draw(params_of(optimizer)))
    torch.testing.assert_close(whole(chunked).norm(dim=1), torch.full((6,), 2.0))
    # layer_groups puts such a tensor with the others, on every process.
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    nn.init.zeros_(model[0].weight)
    fully_shard(model)
    groups = layer_groups(model)
    assert [group["rotate"] for group in groups] == [True, False]
