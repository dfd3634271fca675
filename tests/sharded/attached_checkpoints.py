"""Checkpoints of optimizers that ``attach`` turns, from two processes to other numbers."""

import copy
from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from layca_fast import Handle, attach

from .attached import BF16, F32, FP16, effective
from .checkpoints import restore
from .support import STEPS, Place, network, off, on, shared

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
        restore(model, optimizer, place.folder / f"attached-{number}")
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
