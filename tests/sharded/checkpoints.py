"""Checkpoints that two processes write, and other numbers of them, and other backends, go on from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from layca_fast import FusedLayca

from .support import STEPS, Place, network, off, on, shared, whole


def checkpointed(place: Place, base: dict[str, Any], backend: str, dtype: torch.dtype) -> tuple[nn.Module, FusedLayca]:
    torch.manual_seed(place.seed)
    model = network().to(dtype)
    fully_shard(model)
    groups = [
        {"params": [model[0].weight], "chunks": 2},
        {"params": [model[2].weight], "chunks": "all"},
        {"params": [param for name, param in model.named_parameters() if name not in ("0.weight", "2.weight")]},
    ]
    if base.get("base") == "muon":
        # Its layers are matrices.
        groups[1] = {"params": [model[2].weight, model[4].weight]}
        groups[2] = {"params": [param for param in model.parameters() if param.dim() < 2], "base": "adam"}
    return model, FusedLayca(groups, 0.02, backend=backend, **base)


#: A base without state, one that counts steps, one of 16 bits, and one that directs matrices.
CHECKPOINTED: Sequence[tuple[dict[str, Any], torch.dtype]] = (
    ({}, torch.float32),
    ({"base": "adam", "amsgrad": True}, torch.float32),
    ({"momentum": 0.9}, torch.bfloat16),
    ({"base": "muon"}, torch.float32),
    ({"base": "muon"}, torch.bfloat16),
)


def feed(model: nn.Module, optimizer: FusedLayca, seed: int) -> None:
    """Steps by gradients that do not depend on how many processes made them."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=draws).to(param.dtype)
            param.grad = shared(grad, param.device_mesh, param.placements)
        optimizer.step()


def restore(model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    """Load a distributed checkpoint, over weights such as to_empty() may leave."""
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])


@on(2, exhaustive=(2,))
def two_processes_write_checkpoints(place: Place) -> None:
    for number, (base, dtype) in enumerate(CHECKPOINTED):
        model, optimizer = checkpointed(place, base, "cpu", dtype)
        feed(model, optimizer, place.seed)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=place.folder / f"checkpoint-{number}")
        feed(model, optimizer, place.seed + 1)
        ends = [whole(optimizer.effective_weight(param)) for param in model.parameters()]
        if place.rank == 0:
            torch.save(ends, place.folder / f"ends-{number}.pt")


@on(2, 3, exhaustive=(1, 4))
def any_number_of_processes_goes_on_from_a_checkpoint(place: Place) -> None:
    for number, (base, dtype) in enumerate(CHECKPOINTED):
        for backend in ("cpu", "torch"):
            model, optimizer = checkpointed(place, base, backend, dtype)
            restore(model, optimizer, place.folder / f"checkpoint-{number}")
            feed(model, optimizer, place.seed + 1)
            ends = torch.load(place.folder / f"ends-{number}.pt")
            ours = [whole(optimizer.effective_weight(param)) for param in model.parameters()]
            if place.world == 2 and backend == "cpu":
                assert all(torch.equal(a, b) for a, b in zip(ours, ends, strict=True))
            assert off(ours, ends) < 1e-6


@on(2)
def a_full_state_dict_is_of_plain_tensors(place: Place) -> None:
    """For a run in one process, and back."""
    for base, dtype in CHECKPOINTED:
        model, optimizer = checkpointed(place, base, "cpu", dtype)
        feed(model, optimizer, place.seed)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        weights, state = get_state_dict(model, optimizer, options=options)
        for each in state["state"].values():
            assert not any(isinstance(value, DTensor) for value in each.values())
        again, resumed = checkpointed(place, base, "cpu", dtype)
        set_state_dict(again, resumed, model_state_dict=weights, optim_state_dict=state, options=options)
        for one, its in ((model, optimizer), (again, resumed)):
            feed(one, its, place.seed + 1)
        ours = [whole(resumed.effective_weight(param)) for param in again.parameters()]
        theirs = [whole(optimizer.effective_weight(param)) for param in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
