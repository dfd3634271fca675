"""Optimizers of torch that ``attach`` turns, on layers that are shared out: each case asserts on every process."""

import copy
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from layca_fast import FusedLayca, Handle, attach, detach

from ..attach.support import ALL_OPTIMIZERS
from .layers import LAYERS
from .support import STEPS, Place, counting, draw, expect, give, network, off, on, params_of, shared, whole

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
TYPES = (F32, BF16, FP16)

#: Adafactor and Rprop need operations that torch does not have of DTensors, Muon even shards: see the case of its own.
ELEMENTWISE = [name for name in ALL_OPTIMIZERS if name not in ("Adafactor", "Muon", "Rprop")]

#: Of those groups that other optimizers know, too, and that rotate.
TURNING = [(shape, lies, own) for shape, lies, own in LAYERS if not own.keys() & {"weight_decay", "maximize"}]


def effective(handle: Handle, params: Sequence[Tensor]) -> list[Tensor]:
    return [whole(handle.effective_weight(param)) for param in params]


def pair(
    make: Callable[..., Optimizer], mesh: DeviceMesh, dtype: torch.dtype, every: int = 1
) -> tuple[Optimizer, Optimizer, Handle]:
    """One on whole float32 tensors, one on shards of this type; both attached, with the handle of the latter."""
    plain, shards = [], []
    for shape, placement, own in TURNING[::every]:
        weight = torch.randn(shape).to(dtype)
        plain.append({"params": [Parameter(weight.float())], **own})
        shards.append({"params": [Parameter(shared(weight, mesh, [placement]))], **own})
    ignored = torch.randn(4, 4).to(dtype)
    plain.append({"params": [Parameter(ignored.float())]})
    shards.append({"params": [Parameter(ignored)]})
    optimizers = [make(groups, lr=0.02) for groups in (plain, shards)]
    handles = [attach(each) for each in optimizers]
    return optimizers[0], optimizers[1], handles[1]


def give_both(plain: Optimizer, sharded: Optimizer) -> None:
    """The same gradients, that a float32 holds and the type of the shards does."""
    dtype = params_of(sharded)[0].dtype
    grads = [grad.to(dtype) for grad in draw(params_of(plain))]
    give(plain, [grad.float() for grad in grads])
    give(sharded, grads)


def turning(params: Sequence[Tensor]) -> list[int]:
    return [i for i, param in enumerate(params) if param.dim() > 1]


@on(2, exhaustive=(1, 3, 4))
def every_optimizer_of_torch_takes_the_steps_of_whole_layers(place: Place) -> None:
    """Of float32 ones, whatever the type of the shards. With two processes each has one of the types."""
    mesh = place.mesh()
    for number, name in enumerate(ELEMENTWISE):
        for dtype in TYPES:
            if place.world == 2 and number % 3 != TYPES.index(dtype):
                continue
            # torch takes its time over DTensors: the first two have all layers, the others every second.
            plain, sharded, handle = pair(ALL_OPTIMIZERS[name], mesh, dtype, every=1 + (number > 1))
            for _ in range(3):
                give_both(plain, sharded)
            ours, theirs = effective(handle, params_of(sharded)), params_of(plain)
            turned = turning(theirs)
            assert off([ours[i] for i in turned], [theirs[i] for i in turned]) < 1e-6, (name, dtype)
            drifts = [made.check_norms(at=at).worst()[1] for made in (handle,) for at in ("step", "now")]
            assert max(map(abs, drifts)) < 1e-6
            for i in turned:
                check_states(plain.state[theirs[i]], sharded.state[params_of(sharded)[i]], params_of(sharded)[i])


def check_states(theirs: dict[str, Any], ours: dict[str, Any], param: Tensor) -> None:
    """As FusedLayca keeps its own: radii like the first dimension where layers are whole, remainders as the weights."""
    has = [*theirs, *(["remainder"] if param.dtype != F32 else [])]
    assert list(ours) == has
    if not isinstance(param, DTensor):
        return
    radius = ours["radius"]
    assert radius.dtype == torch.float64
    assert radius.placements == param.placements or all(each.is_replicate() for each in radius.placements)
    torch.testing.assert_close(whole(radius), theirs["radius"], rtol=1e-6, atol=0)
    if param.dtype != F32:
        assert (ours["remainder"].dtype, ours["remainder"].placements) == (param.dtype, param.placements)
    for name, value in theirs.items():
        if isinstance(value, Tensor) and value.dim() > 0 and name != "radius":
            assert ours[name].dtype == F32
            torch.testing.assert_close(whole(ours[name]), value, rtol=1e-4, atol=1e-5)


@on(2, exhaustive=(4,))
def muon_of_torch_turns_even_shards(place: Place) -> None:
    """Its directions are sums of bfloat16 products in another order: both turn by the angle, and keep their norms."""
    for dtype in (F32, BF16):
        weight = torch.randn(8, 12).to(dtype)
        param = Parameter(shared(weight, place.mesh(), [Shard(0)]))
        optimizer = ALL_OPTIMIZERS["Muon"]([param], lr=0.02)
        handle = attach(optimizer)
        for _ in range(STEPS):
            before = whole(handle.effective_weight(param)).double()
            give(optimizer, [torch.randn(8, 12).to(dtype)])
            after = whole(handle.effective_weight(param)).double()
            torch.testing.assert_close(after.norm(), weight.double().norm(), rtol=1e-6, atol=0)
            angle = torch.acos((after * before).sum() / after.norm() / before.norm())
            torch.testing.assert_close(angle, torch.tensor(0.02, dtype=angle.dtype).atan(), rtol=1e-3, atol=0)


@on(2, exhaustive=(3,))
def one_sum_per_step_of_24_bytes_per_layer_under_attach(place: Place) -> None:
    for make in (SGD, AdamW):
        for dtype in (F32, BF16):
            _, sharded, _ = pair(make, place.mesh(), dtype)
            params = params_of(sharded)
            give(sharded, [grad.to(dtype) for grad in draw(params)])
            with counting() as seen:
                give(sharded, [grad.to(dtype) for grad in draw(params)])
            # Neither chunks that a process has whole, nor replicas, nor what does not rotate: as in FusedLayca.
            layers = 1 + 1 + (3 if place.world == 2 else 0) + 8
            assert [tensor.dtype for tensor in seen] == [torch.float64]
            assert [tensor.numel() * tensor.element_size() for tensor in seen] == [24 * layers], seen[0].shape


def learn(model: nn.Module, optimizer: Optimizer, seed: int) -> list[Tensor]:
    """Steps by gradients of the network itself; what was summed over processes in them."""
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


def twins(place: Place) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(place.seed)
    plain = network()
    torch.manual_seed(place.seed)
    return plain, network()


@on(3, exhaustive=(1, 2, 4))
def fully_shard_under_attach_trains_as_one_process_does(place: Place) -> None:
    plain, model = twins(place)
    fully_shard(model[0])
    fully_shard(model)
    optimizers = [SGD(each.parameters(), 0.02, momentum=0.9) for each in (plain, model)]
    for each in optimizers:
        attach(each)
    learn(plain, optimizers[0], place.seed)
    sums = learn(model, optimizers[1], place.seed)
    assert off(list(model.parameters()), list(plain.parameters())) < 2e-6
    # The first step asks whether a layer is all zeros.
    assert len(sums) == (STEPS + 1 if place.world > 1 else 0)


@on(2)
def a_model_of_16_bits_trains_under_fully_shard(place: Place) -> None:
    """By the gradients that its own backward leaves: every layer keeps its norm, and turns by the angle."""
    for dtype in (BF16, FP16):
        torch.manual_seed(place.seed)
        model = network().to(dtype)
        fully_shard(model[0])
        fully_shard(model)
        # Biases take AdamW's own step, whose default eps is zero in float16.
        optimizer = AdamW(model.parameters(), 1e-3, eps=1e-4, weight_decay=0.0)
        handle = attach(optimizer)
        layers = [param for param in model.parameters() if param.dim() > 1]
        norms = [whole(param).double().norm() for param in layers]
        for batch in torch.randn(STEPS, 16, 7).to(dtype):
            before = effective(handle, layers)
            optimizer.zero_grad()
            model(batch).float().square().mean().backward()
            optimizer.step()
            for old, new, norm in zip(before, effective(handle, layers), norms, strict=True):
                torch.testing.assert_close(new.double().norm(), norm, rtol=1e-6, atol=0)
                old, new = old.double(), new.double()
                cosine = (old * new).sum() / old.norm() / new.norm()
                angle = torch.atan(torch.tensor(1e-3, dtype=torch.float64))
                # Storing the weights in float32 moves each by 2**-24 of it.
                torch.testing.assert_close(torch.acos(cosine), angle, rtol=1e-3, atol=0)


@on(4)
def fully_shard_over_tensor_parallel_under_attach(place: Place) -> None:
    plain, model = twins(place)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    optimizers = [AdamW(each.parameters(), 0.02, weight_decay=0.0) for each in (plain, model)]
    for each in optimizers:
        attach(each)
    learn(plain, optimizers[0], place.seed)
    sums = learn(model, optimizers[1], place.seed)
    assert off(list(model.parameters()), list(plain.parameters())) < 5e-6
    layers = [param for param in model.parameters() if param.dim() > 1]
    on_tp = [param for param in layers if param.device_mesh.ndim == 2]
    # One all-reduce per dimension of the mesh, of three float64 numbers per layer.
    assert [tensor.numel() for tensor in sums[-2:]] == [3 * len(layers), 3 * len(on_tp)]
    assert len(sums) == 2 * STEPS + 2
    chunked = SGD([model[0].weight], 0.02)
    attach(chunked, chunks=2)
    expect(ValueError, "in turns", chunked.step)


@on(4)
def replicas_of_attached_shards_keep_the_same_bits(place: Place) -> None:
    """Hybrid sharding: a mesh of two dimensions of which only one shards."""
    mesh = init_device_mesh("cpu", (2, 2))
    for dtype in (F32, BF16):
        weight = torch.randn(6, 5).to(dtype)
        plain = SGD([Parameter(weight.float())], 0.02, momentum=0.9)
        sharded = SGD([Parameter(shared(weight, mesh, [Replicate(), Shard(0)]))], 0.02, momentum=0.9)
        attach(plain)
        handle = attach(sharded)
        for _ in range(STEPS):
            with counting() as seen:
                give_both(plain, sharded)
        assert len(seen) == 1
        (param,) = params_of(sharded)
        assert off(effective(handle, [param]), params_of(plain)) < 1e-6
        local = param.to_local().detach().view(torch.int16 if dtype == BF16 else torch.int32).long()
        others = [torch.empty_like(local) for _ in range(2)]
        dist.all_gather(others, local, group=mesh.get_group(0))
        assert all(torch.equal(other, local) for other in others)


@on(2, exhaustive=(3,))
def gradients_of_attached_shards_may_be_placed_otherwise(place: Place) -> None:
    """As tensor parallel leaves some."""
    mesh = place.mesh()
    for make in (SGD, AdamW):
        for dtype in (F32, BF16):
            weight = torch.randn(6, 5).to(dtype)
            plain = make([Parameter(weight.float())], lr=0.02)
            sharded = make([param := Parameter(shared(weight, mesh, [Shard(0)]))], lr=0.02)
            attach(plain)
            handle = attach(sharded)
            for placement in (Replicate(), Shard(1)):
                grad = torch.randn(6, 5).to(dtype)
                params_of(plain)[0].grad = grad.float()
                param.grad = shared(grad, mesh, [placement])
                plain.step()
                if dtype == F32:
                    # Which placements its operations take is torch's affair.
                    param.grad = param.grad.redistribute(placements=param.placements)
                sharded.step()
            assert off(effective(handle, [param]), params_of(plain)) < 1e-6


@on(2)
def an_attached_shard_without_a_gradient_takes_part(place: Place) -> None:
    """Whether its first gradient comes in the first step, or later: its state is made, and moves, with that alone."""
    mesh = place.mesh()
    for make in (AdamW, SGD, ALL_OPTIMIZERS["RMSprop"]):
        for dtype in (F32, BF16):
            weight = torch.randn(6, 5).to(dtype)
            param = Parameter(shared(weight, mesh, [Shard(0)]))
            optimizer = make([param], lr=0.1)
            handle = attach(optimizer)
            for lacking in (True, False, True):
                states = {name: value.to_local().clone() for name, value in buffers(optimizer, param).items()}
                before = whole(handle.effective_weight(param)).double()
                param.grad = shared(torch.randn(6, 5).to(dtype), mesh, [Shard(0)])
                if lacking and place.rank == 1:
                    param.grad = None
                with counting() as seen:
                    optimizer.step()
                after = whole(handle.effective_weight(param)).double()
                torch.testing.assert_close(after.norm(), weight.double().norm(), rtol=1e-6, atol=0)
                angle = torch.acos((after * before).sum() / after.norm() / before.norm())
                torch.testing.assert_close(angle, torch.tensor(0.1, dtype=angle.dtype).atan(), rtol=1e-4, atol=0)
                if lacking:
                    # The rows of the process without a gradient are only scaled.
                    cosine = nn.functional.cosine_similarity(after[3:].flatten(), before[3:].flatten(), 0)
                    assert float(cosine) > 1 - 1e-12
                if lacking and place.rank == 1:
                    assert buffers(optimizer, param).keys() == states.keys()
                    assert all(torch.equal(buffers(optimizer, param)[k].to_local(), v) for k, v in states.items())
                assert "radius" in optimizer.state[param]
            assert len(seen) == 1
            if make is AdamW:
                assert float(optimizer.state[param]["step"]) == (1 if place.rank == 1 else 3)


def buffers(optimizer: Optimizer, param: Tensor) -> dict[str, DTensor]:
    state = optimizer.state.get(param, {})
    return {k: v for k, v in state.items() if isinstance(v, DTensor) and k not in ("radius", "remainder")}


@on(2, exhaustive=(3,))
def attached_layers_without_a_gradient_anywhere_stay(place: Place) -> None:
    for make in (AdamW, SGD):
        for dtype in (F32, BF16):
            _, sharded, _ = pair(make, place.mesh(), dtype)
            for param in params_of(sharded)[1:]:
                param.grad = None
            first = params_of(sharded)[0]
            first.grad = shared(torch.randn(first.shape).to(dtype), first.device_mesh, first.placements)
            before = [whole(param).clone() for param in params_of(sharded)]
            with counting() as seen:
                sharded.step()
            assert len(seen) == 3 if place.world == 2 else 2  # two of them ask for layers of zeros
            after = [whole(param) for param in params_of(sharded)]
            same = [bool((a == b).all()) for a, b in zip(after, before, strict=True)]
            assert same == [False] + [True] * (len(after) - 1)


@on(2, exhaustive=(3,))
def a_process_may_make_its_plan_anew_alone(place: Place) -> None:
    """Memory that moves on one process, a step that fails there: nobody waits for sums that others do not make."""
    mesh = place.mesh()
    for dtype in (F32, BF16):
        params = [Parameter(shared(torch.randn(6, 5).to(dtype), mesh, [Shard(0)])) for _ in range(2)]
        optimizer = SGD(params, 0.02)
        attach(optimizer)
        norms = [whole(param).double().norm() for param in params]
        for step in range(4):
            for param in params:
                param.grad = shared(torch.randn(6, 5).to(dtype), mesh, [Shard(0)])
            if place.rank == 1:
                params[1].grad = None
                local = params[0].to_local()
                if step == 2:
                    params[0]._local_tensor = local.detach().clone()
            with counting() as seen:
                optimizer.step()
            assert len(seen) == (2 if step == 0 else 1)
        for param, norm in zip(params, norms, strict=True):
            assert abs(float(whole(param).double().norm() / norm) - 1) < (1e-6 if dtype == F32 else 1e-2)


@on(2)
def what_cannot_be_attached_is_said_before_anything_moves(place: Place) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    mesh = place.mesh()
    partial = Parameter(DTensor.from_local(torch.randn(4, 4), mesh, [Partial()]))
    expect(ValueError, "Redistribute it to Shard or Replicate first", lambda: attach(SGD([partial], 0.1)))
    model = FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu"))
    expect(TypeError, "FSDP1 flat parameter", lambda: attach(SGD(model.parameters(), 0.1)))
    for name in ("Adafactor", "Rprop"):
        # Torch has no DTensors of some of their operations, with attach or without.
        param = Parameter(shared(torch.randn(6, 4).bfloat16(), mesh, [Shard(0)]))
        optimizer, before = ALL_OPTIMIZERS[name]([param], lr=0.1), whole(param).clone()
        attach(optimizer)
        expect(RuntimeError, "not supported", lambda made=optimizer: give(made, [torch.randn(6, 4).bfloat16()]))
        assert params_of(optimizer)[0] is param
        assert torch.equal(whole(param), before)
    zero = Parameter(shared(torch.zeros(4, 4), mesh, [Shard(0)]))
    optimizer = AdamW([zero], 0.1)
    attach(optimizer)
    zero.grad = shared(torch.randn(4, 4), mesh, [Shard(0)])
    expect(ValueError, "no direction to turn", optimizer.step)
    assert not whole(zero).any()
    assert not optimizer.state


@on(3)
def attached_parameters_of_other_processes_are_left_to_them(place: Place) -> None:
    mesh = DeviceMesh("cpu", [0, 1])
    here = place.mesh()
    weight, all_have = torch.randn(4, 6), torch.randn(6, 5)
    params = [Parameter(shared(weight, mesh, [Shard(0)])), Parameter(shared(all_have, here, [Shard(0)]))]
    optimizer = SGD(params, 0.05)
    attach(optimizer)
    for _ in range(2):
        params[1].grad = shared(torch.randn(6, 5), here, [Shard(0)])
        grad = torch.randn(4, 6)
        if place.rank < 2:
            params[0].grad = shared(grad, mesh, [Shard(0)])
        optimizer.step()
    assert abs(float(whole(params[1]).double().norm() / all_have.double().norm()) - 1) < 1e-6
    if place.rank < 2:
        assert abs(float(whole(params[0]).double().norm() / weight.double().norm()) - 1) < 1e-6
        assert not torch.equal(whole(params[0]), weight)


@on(2)
def detaching_from_shards_takes_out_what_attach_kept(place: Place) -> None:
    for dtype in (F32, BF16):
        param = Parameter(shared(torch.randn(6, 5).to(dtype), place.mesh(), [Shard(0)]))
        optimizer = AdamW([param], 0.1)
        attach(optimizer)
        give(optimizer, [torch.randn(6, 5).to(dtype)])
        detach(optimizer)
        assert {k: v.dtype for k, v in optimizer.state[param].items()} == {
            "step": F32,
            "exp_avg": dtype,
            "exp_avg_sq": dtype,
        }
        norm = whole(param).double().norm()
        give(optimizer, [torch.randn(6, 5).to(dtype)])
        assert abs(float(whole(param).double().norm() / norm) - 1) > 1e-4


# Checkpoints: two processes write what other numbers of them go on from.

CHECKPOINTED: Sequence[tuple[Callable[..., Optimizer], torch.dtype]] = (
    (SGD, F32),
    (lambda params, **options: AdamW(params, amsgrad=True, weight_decay=0.0, **options), F32),
    (lambda params, **options: SGD(params, momentum=0.9, **options), BF16),
    (lambda params, **options: AdamW(params, weight_decay=0.0, **options), FP16),
)


def checkpointed(place: Place, number: int) -> tuple[nn.Module, Optimizer, Handle]:
    make, dtype = CHECKPOINTED[number]
    torch.manual_seed(place.seed)
    model = network().to(dtype)
    fully_shard(model)
    groups = [
        {"params": [model[0].weight], "chunks": 2},
        {"params": [model[2].weight], "chunks": "all"},
        {"params": [param for name, param in model.named_parameters() if name not in ("0.weight", "2.weight")]},
    ]
    optimizer = make(groups, lr=0.02)
    return model, optimizer, attach(optimizer)


def feed(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    """Steps by gradients that do not depend on how many processes made them."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=draws).to(param.dtype)
            param.grad = shared(grad, param.device_mesh, param.placements)
        optimizer.step()


def layers_of(model: nn.Module, handle: Handle) -> list[Tensor]:
    """Biases of 16 bits are rounded as their own optimizer does it."""
    return effective(handle, [param for param in model.parameters() if param.dim() > 1])


@on(2, exhaustive=(2,))
def two_processes_write_checkpoints_of_attached_optimizers(place: Place) -> None:
    for number in range(len(CHECKPOINTED)):
        model, optimizer, handle = checkpointed(place, number)
        feed(model, optimizer, place.seed)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=place.folder / f"attached-{number}")
        feed(model, optimizer, place.seed + 1)
        ends = layers_of(model, handle)
        if place.rank == 0:
            torch.save(ends, place.folder / f"attached-ends-{number}.pt")


@on(2, 3, exhaustive=(1, 4))
def any_number_of_processes_goes_on_from_an_attached_checkpoint(place: Place) -> None:
    for number in range(len(CHECKPOINTED)):
        model, optimizer, handle = checkpointed(place, number)
        with torch.no_grad():
            for param in model.parameters():
                # As to_empty() may leave them.
                param.zero_()
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state}
        dcp.load(saved, checkpoint_id=place.folder / f"attached-{number}")
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        feed(model, optimizer, place.seed + 1)
        ends = torch.load(place.folder / f"attached-ends-{number}.pt")
        ours = layers_of(model, handle)
        if place.world == 2:
            assert all(torch.equal(a, b) for a, b in zip(ours, ends, strict=True))
        assert off(ours, ends) < 1e-6


@on(2)
def a_full_state_dict_of_an_attached_optimizer_is_of_plain_tensors(place: Place) -> None:
    """For a run in one process, and back."""
    for number in range(len(CHECKPOINTED)):
        model, optimizer, handle = checkpointed(place, number)
        feed(model, optimizer, place.seed)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        weights, state = get_state_dict(model, optimizer, options=options)
        values = chain.from_iterable(each.values() for each in state["state"].values())
        assert not any(isinstance(value, DTensor) for value in values)
        again, resumed, its_handle = checkpointed(place, number)
        # Loaded as they are, counts of steps would be the same tensors.
        state = copy.deepcopy(state)
        set_state_dict(again, resumed, model_state_dict=weights, optim_state_dict=state, options=options)
        for one, its in ((model, optimizer), (again, resumed)):
            feed(one, its, place.seed + 1)
        pairs = zip(layers_of(again, its_handle), layers_of(model, handle), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@on(2)
def attached_sgd_on_shards_is_fused_layca(place: Place) -> None:
    """Weights, radii and remainders, and how they are shared out."""
    for dtype in TYPES:
        _, plain, handle = pair(lambda groups, lr: SGD(groups, lr, momentum=0.9), place.mesh(), dtype)
        groups = [
            {**group, "params": [Parameter(p.detach().clone()) for p in group["params"]]}
            for group in plain.param_groups
        ]
        for group in groups:
            for name in ("dampening", "nesterov", "weight_decay", "maximize", "foreach", "differentiable", "fused"):
                del group[name]
        fused = FusedLayca(groups)
        for _ in range(STEPS):
            grads = [grad.to(dtype) for grad in draw(params_of(plain))]
            give(fused, grads)
            give(plain, grads)
        for i in turning(params_of(plain)):
            ours, theirs = params_of(plain)[i], params_of(fused)[i]
            assert off([handle.effective_weight(ours)], [fused.effective_weight(theirs)]) < 1e-6
            for name in ("radius", *(["remainder"] if dtype != F32 else [])):
                found, expected = plain.state[ours][name], fused.state[theirs][name]
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                assert getattr(found, "placements", None) == getattr(expected, "placements", None)
            torch.testing.assert_close(whole(plain.state[ours]["radius"]), whole(fused.state[theirs]["radius"]))
