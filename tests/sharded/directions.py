"""Matrices that lie on several processes, whose directions need the whole of them."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter

from bench import predict
from layca_fast import FusedLayca, layer_groups
from layca_fast.formulas.orthogonal import NewtonSchulz
from layca_fast.step import directions

from .support import Place, counting, draw, expect, give, off, on, params_of, shared, whole

LONG = 20


@contextmanager
def counting_all_to_alls() -> Iterator[list[int]]:
    """The bytes that this process sends to others, one number for each all-to-all meanwhile."""
    seen: list[int] = []
    plain = dist.all_to_all_single

    def count(output: Tensor, given: Tensor, taken: list[int], sent: list[int], group: Any) -> Any:
        seen.append((sum(sent) - sent[group.rank()]) * given.element_size())
        return plain(output, given, taken, sent, group)

    dist.all_to_all_single = count
    try:
        yield seen
    finally:
        dist.all_to_all_single = plain


@contextmanager
def counting_matrices() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the matrices that directions are made of on this process, one for each."""
    seen: list[tuple[int, ...]] = []
    plain = NewtonSchulz.run

    def count(self: NewtonSchulz, matrices: Tensor, norms: Tensor, scratch: Tensor) -> Tensor:
        seen.extend([tuple(matrices.shape[1:])] * len(matrices))
        return plain(self, matrices, norms, scratch)

    NewtonSchulz.run = count  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        NewtonSchulz.run = plain  # type: ignore[method-assign]


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


#: Wide, tall, convolutions, packed and stacked layers, plain steps.
WEIGHTS: Sequence[tuple[tuple[int, ...], dict[str, Any]]] = (
    ((8, 12), {}),
    ((12, 4), {"rule": "hyperball"}),
    ((4, 4, 3, 3), {"adjust_lr": "match_rms_adamw"}),
    ((4, 12), {"rotate": False, "weight_decay": 0.1}),
    ((9, 5), {"rotate": False}),
    ((5, 7), {"nesterov": False, "ns_steps": 3}),
)


def twins(
    mesh: DeviceMesh, placements: Sequence[Placement], weights: Any = WEIGHTS, **options: Any
) -> tuple[FusedLayca, FusedLayca]:
    plain, shards = [], []
    for shape, own in weights:
        weight = torch.randn(shape)
        plain.append({"params": [Parameter(weight.clone())], **own})
        shards.append({"params": [Parameter(shared(weight, mesh, placements))], **own})
    return tuple(FusedLayca(groups, 0.05, base="muon", **options) for groups in (plain, shards))  # type: ignore[return-value]


def run(optimizers: Sequence[FusedLayca], steps: int = LONG) -> None:
    for _ in range(steps):
        grads = draw(params_of(optimizers[0]))
        for optimizer in optimizers:
            give(optimizer, grads)


def model_of() -> nn.Sequential:
    """Odd sizes, so that shards are uneven, and empty on the last processes."""
    return nn.Sequential(nn.Linear(7, 10), nn.Tanh(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 6))


@on(1, 2, 3, 4)
def muon_under_fsdp2_is_that_of_one_process(place: Place) -> None:
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
                optimizer.step()
        assert off(list(model.parameters()), list(plain.parameters())) < 1e-5
        # The next rule begins with the same weights.
        with torch.no_grad():
            for one, other in zip(model.parameters(), plain.parameters(), strict=True):
                other.copy_(whole(one))


@on(2, 3, 4)
def muon_along_either_dimension_is_that_of_whole_matrices(place: Place) -> None:
    """With as many collectives as there may be, and each matrix made once."""
    backwards = DeviceMesh("cpu", list(reversed(range(place.world))))
    for placement, mesh in ((Shard(0), place.mesh()), (Shard(1), place.mesh()), (Shard(0), backwards)):
        for backend in ("cpu", "torch"):
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


@on(4, 6)
def muon_on_a_mesh_of_two_dimensions_is_that_of_whole_matrices(place: Place) -> None:
    """Two all-to-alls along each dimension that shards, however many tensors it shards how."""
    mesh = init_device_mesh("cpu", (2, place.world // 2))
    for placements in two_dimensions(mesh):
        plain, sharded = twins(mesh, placements)
        run((plain, sharded))
        assert off(params_of(sharded), params_of(plain)) < 1e-5
        with counting_all_to_alls() as sent:
            give(sharded, draw(params_of(sharded)))
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


@on(2, 3)
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
