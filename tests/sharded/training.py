"""Networks under FSDP2, tensor parallel, DDP and ZeRO: each case asserts on every process of a world."""

import copy
import hashlib
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import Parameter

from layca_fast import FusedLayca, layer_groups
from layca_fast.state.layout import is_vector

from .support import STEPS, Place, counting, expect, network, off, on, shared, whole


def twin_networks(place: Place) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(place.seed)
    plain = network()
    torch.manual_seed(place.seed)
    return plain, network()


def learn(model: nn.Sequential, optimizer: FusedLayca, seed: int, steps: int = STEPS) -> None:
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs, targets = torch.randn(16, 7, generator=draws), torch.randn(16, 2, generator=draws)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_([model[0].weight, model[4].weight], 0.1)
        optimizer.step()


@on(2, 3, exhaustive=(1, 4))
def fully_shard_trains_as_one_process_does(place: Place) -> None:
    """With clipping, layer_groups of the sharded model, and a parameter that FSDP2 was told to leave alone."""
    plain, model = twin_networks(place)
    fully_shard(model[0])
    fully_shard(model, ignored_params={model[2].weight})
    optimizer = FusedLayca(layer_groups(model, lr=0.02), momentum=0.9)
    learn(plain, FusedLayca(layer_groups(plain, lr=0.02), momentum=0.9), place.seed)
    learn(model, optimizer, place.seed)
    assert off(list(model.parameters()), list(plain.parameters())) < 2e-6
    assert not isinstance(model[2].weight, DTensor)
    assert isinstance(model[0].weight, DTensor)


@on(1, 3, exhaustive=(2, 4))
def learned_radii_of_shards_are_those_of_whole_layers(place: Place) -> None:
    """In the same all-reduce: the dots of the gradients travel with the others."""
    plain, model = twin_networks(place)
    fully_shard(model)
    learned = {"momentum": 0.9, "radius": "learned", "radius_lr": 50.0}
    before = [param.detach().norm() for param in plain.parameters()]
    other = FusedLayca(layer_groups(plain, lr=0.02), **learned)
    learn(plain, other, place.seed, steps=STEPS - 1)
    learn(plain, other, place.seed, steps=1)
    optimizer = FusedLayca(layer_groups(model, lr=0.02), **learned)
    learn(model, optimizer, place.seed, steps=STEPS - 1)
    with counting() as sums:
        learn(model, optimizer, place.seed, steps=1)
    assert off(list(model.parameters()), list(plain.parameters())) < 2e-6
    changes = [float(param.detach().norm() / norm) - 1 for param, norm in zip(plain.parameters(), before, strict=True)]
    assert abs(changes[0]) > 1e-3
    # Three dots of each layer, and three more of its gradient; clipping's sums are torch's own.
    layers = sum(not is_vector(param) for param in model.parameters())
    assert [tuple(each.shape) for each in sums if each.dtype == torch.float64] == [(2 * layers, 3)] * (place.world > 1)


@on(4)
def fully_shard_over_tensor_parallel_trains_as_one_process_does(place: Place) -> None:
    plain, model = twin_networks(place)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    assert any(type(each).__name__ == "_StridedShard" for each in model[0].weight.placements)
    optimizer = FusedLayca(model.parameters(), 0.02, base="adam")
    learn_unclipped(plain, FusedLayca(plain.parameters(), 0.02, base="adam"), place.seed)
    sums = learn_unclipped(model, optimizer, place.seed)
    assert off(list(model.parameters()), list(plain.parameters())) < 5e-6
    layers = [param for param in model.parameters() if param.dim() > 1]
    on_tp = [param for param in layers if param.device_mesh.ndim == 2]
    # One all-reduce per dimension of the mesh, of three float64 numbers per layer.
    assert [tensor.numel() for tensor in sums[-2:]] == [3 * len(layers), 3 * len(on_tp)]
    assert all(tensor.dtype == torch.float64 for tensor in sums)
    assert len(sums) == 2 * STEPS + 2  # the first step asks whether a layer is all zeros
    chunked = FusedLayca([model[0].weight], 0.02, chunks=2)
    expect(ValueError, "in turns", chunked.step)


@on(2)
def tensor_parallel_alone_trains_as_one_process_does(place: Place) -> None:
    """Gradients of the embedding and of the norm layer come with other placements than the parameters have."""
    torch.manual_seed(place.seed)
    plain = nn.Sequential(nn.Embedding(12, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8))
    model = copy.deepcopy(plain)
    sequence = Shard(1)
    styles = {
        "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence),
        "1": SequenceParallel(),
        "2": ColwiseParallel(input_layouts=sequence),
        "4": RowwiseParallel(),
    }
    parallelize_module(model, place.mesh(), styles)
    ours, theirs = (FusedLayca(each.parameters(), 0.02, momentum=0.9) for each in (model, plain))
    for _ in range(STEPS):
        tokens = torch.randint(12, (3, 4))
        for each, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            each(tokens).square().sum().backward()
            optimizer.step()
    assert isinstance(model[1].weight.grad, DTensor)
    assert model[1].weight.grad.placements == (Partial(),)
    assert off(list(model.parameters()), list(plain.parameters())) < 2e-6


def learn_unclipped(model: nn.Module, optimizer: FusedLayca, seed: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    sums: list[Tensor] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = torch.randn(16, 7, generator=draws), torch.randn(16, 2, generator=draws)
        nn.functional.mse_loss(model(inputs), targets).backward()
        with counting() as seen:
            optimizer.step()
        sums += seen
    return sums


@on(2)
def loss_scaling_skips_on_every_process_or_none(place: Place) -> None:
    mesh = place.mesh()
    for unscales, base in product((False, True), ({"momentum": 0.9}, {"base": "muon"})):
        param = Parameter(shared(torch.randn(4, 4), mesh, [Shard(0)]))
        optimizer = FusedLayca([param], 0.1, unscale_in_step=unscales, **base)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            scaler.scale(torch.zeros(()))
            grad = torch.randn(4, 4)
            if step == 1:
                grad[3, 0] = torch.inf  # on the last process
            before = whole(param).clone()
            param.grad = shared(4.0 * grad, mesh, [Shard(0)])
            scaler.step(optimizer)
            scaler.update(4.0)
            assert torch.equal(whole(param), before) == (step == 1)
        found = [torch.zeros(4, 4) for _ in range(2)]
        dist.all_gather(found, whole(param).contiguous())
        assert torch.equal(found[0], found[1])


@on(2)
def fsdp1_is_refused(place: Place) -> None:
    """With and without use_orig_params, built before the optimizer and after."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (False, True):
        model = FullyShardedDataParallel(network(), use_orig_params=original, device_id=torch.device("cpu"))
        expect(TypeError, "FSDP1 flat parameter", lambda model=model: FusedLayca(model.parameters(), 0.1))
    model = network()
    optimizer = FusedLayca(model.parameters(), 0.1)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    wrapped(torch.randn(3, 7)).sum().backward()
    expect(TypeError, "FSDP1 flat parameter", optimizer.step)


@on(2)
def replicas_under_ddp_keep_the_same_bits_for_1000_steps(place: Place) -> None:
    torch.manual_seed(place.rank)  # DDP hands the first process's weights to all
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)))
    optimizer = FusedLayca(layer_groups(model, lr=0.01), momentum=0.9)
    inputs = torch.randn(1000, 4, 5)
    for batch in inputs:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    tensors = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    digest = hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()
    found: list[Any] = [None, None]
    dist.all_gather_object(found, digest)
    assert found[0] == found[1]
    torch.testing.assert_close(
        model.module[0].weight.double().norm(), optimizer.state[model.module[0].weight]["radius"][0]
    )


@on(2)
def zero_redundancy_optimizer_runs_saves_and_loads(place: Place) -> None:
    # Its package compiles at import, which warns.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def make(model: nn.Module) -> Any:
        return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=FusedLayca, lr=0.02, base="adam")

    plain, model = twin_networks(place)
    theirs = FusedLayca(plain.parameters(), 0.02, base="adam")
    learn(plain, theirs, place.seed)
    optimizer = make(model)
    learn(model, optimizer, place.seed)
    assert off(list(model.parameters()), list(plain.parameters())) == 0.0
    optimizer.consolidate_state_dict(to=0)
    # Loaded as it is, it would be the same tensors.
    saved: list[Any] = [copy.deepcopy(optimizer.state_dict()) if place.rank == 0 else None]
    dist.broadcast_object_list(saved)
    resumed = copy.deepcopy(model)
    again = make(resumed)
    again.load_state_dict(saved[0])
    for each, its in ((model, optimizer), (resumed, again), (plain, theirs)):
        learn(each, its, place.seed + 1)
    assert off(list(model.parameters()), list(plain.parameters())) == 0.0
    assert off(list(resumed.parameters()), list(plain.parameters())) == 0.0
