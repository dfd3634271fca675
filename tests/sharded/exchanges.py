"""What is sent where matrices lie on several processes: how much, how often, and what is not."""

from math import prod

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.nn import Parameter

from bench import predict
from layca_fast import FusedLayca
from layca_fast.step import directions

from .support import Place, counting, draw, give, on, params_of, shared, whole
from .travelling import WEIGHTS, counting_all_to_alls, counting_matrices, everywhere, run, twins


@on(2, 4)
def what_travels_is_each_matrix_but_for_the_owners_part(place: Place) -> None:
    """There and back, in the type that directions are made in, if that is narrower."""
    weights = [((8, 12), {})] * 5 + [((4, 16), {})] * 3
    elements = sum(prod(shape) for shape, _ in weights)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 4)):
        _, sharded = twins(place.mesh(), [Shard(0)], weights, ns_dtype=dtype)
        give(sharded, draw(params_of(sharded)))
        with counting_all_to_alls() as sent:
            give(sharded, draw(params_of(sharded)))
        there, back = (sum(each) for each in zip(*everywhere(sent), strict=True))
        assert there == back == size * elements * (place.world - 1) // place.world
        assert there + back == place.world * predict.exchanged_bytes(elements, place.world, size)


@on(2, 3)
def layers_that_lie_whole_on_a_process_are_not_sent(place: Place) -> None:
    """Experts by expert, packed projections that are cut between them, replicas, and plain tensors."""
    mesh = place.mesh()
    experts = Parameter(shared(torch.randn(6, 4, 5), mesh, [Shard(0)]))
    packed = Parameter(shared(torch.randn(6 * place.world, 4), mesh, [Shard(0)]))
    replica, plain = Parameter(shared(torch.randn(4, 5), mesh, [Replicate()])), Parameter(torch.randn(4, 5))
    groups = [
        {"params": [experts], "chunks": 6},
        {"params": [packed], "chunks": 2 * place.world},
        {"params": [replica, plain]},
    ]
    optimizer = FusedLayca(groups, 0.05, base="muon")
    give(optimizer, draw(params_of(optimizer)))
    with counting_all_to_alls() as sent, counting() as sums, counting_matrices() as made:
        give(optimizer, draw(params_of(optimizer)))
    assert sent == sums == []
    assert len(made) == 6 // place.world + 2 + 2


@on(3, exhaustive=(2,))
def windows_of_any_size_give_the_same_bits_in_memory_that_does_not_grow(place: Place) -> None:
    plain = directions.WINDOW["cpu"]
    results, rooms = [], []
    try:
        for window, depth in ((plain, 4), (1, 4), (1, 12)):
            directions.WINDOW["cpu"] = window
            torch.manual_seed(place.seed)
            _, sharded = twins(place.mesh(), [Shard(0)], WEIGHTS * depth)
            run((sharded,), 3)
            results.append([param._local_tensor.detach().clone() for param in params_of(sharded)])
            with counting_all_to_alls() as sent, counting() as sums:
                give(sharded, draw(params_of(sharded)))
            assert len(sent) == 2 * len(sums)
            assert (len(sums) == 1) == (window == plain)
            rooms.append({key[0]: buffer.numel() for key, buffer in sharded._plan._scratch._buffers.items()})
    finally:
        directions.WINDOW["cpu"] = plain
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    # Three times as many matrices need as much memory. (Windows differ, and a buffer grows by half of its size.)
    assert sum(rooms[2].values()) <= 2 * sum(rooms[1].values())


@on(2)
def in_backward_each_sharded_matrix_travels_by_itself(place: Place) -> None:
    """To the same weights."""
    ordinary, inside = (nn.Sequential(nn.Linear(7, 5, bias=False), nn.Linear(5, 4, bias=False)) for _ in range(2))
    inside.load_state_dict(ordinary.state_dict())
    pairs = []
    for model in (ordinary, inside):
        fully_shard(model)
        pairs.append((model, FusedLayca(model.parameters(), 0.05, base="muon")))
    with pairs[1][1].step_in_backward():
        for _ in range(4):
            inputs = torch.randn(3, 7)
            for model, optimizer in pairs:
                with counting_all_to_alls() as sent:
                    model(inputs).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                assert len(sent) == (4 if model is inside else 2)
    assert all(torch.equal(whole(a), whole(b)) for a, b in zip(ordinary.parameters(), inside.parameters(), strict=True))
