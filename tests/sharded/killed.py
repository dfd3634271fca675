"""A sharded run that is killed and goes on with another number of processes, from what torch wrote last."""

import json
import multiprocessing
import random
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from layca_fast import FusedLayca

from .support import network, shared, start, whole

#: Numbers of processes, one life after the other; the last comes to the end.
LIVES = (2, 3, 1)
STEPS = 60


def optimizer_of(model: nn.Module) -> FusedLayca:
    return FusedLayca(model.parameters(), 0.02, base="adam")


def step(model: nn.Module, optimizer: FusedLayca, seed: int, number: int) -> None:
    """The same in every life, whatever the number of processes, and on plain tensors."""
    draws = torch.Generator().manual_seed(seed + number)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=draws)
        is_shared = hasattr(param, "device_mesh")
        param.grad = shared(grad, param.device_mesh, param.placements) if is_shared else grad
    optimizer.step()


def live(rank: int, world: int, number: int, folder: Path, seed: int) -> None:
    start(rank, world, folder / f"life-{number}")
    torch.manual_seed(seed)
    model = network()
    fully_shard(model)
    optimizer = optimizer_of(model)
    latest, done = folder / "latest.json", 0
    if latest.exists():
        done = json.loads(latest.read_text())
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state}
        dcp.load(saved, checkpoint_id=folder / f"step-{done}")
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    if rank == 0:
        (folder / f"from-{number}.json").write_text(json.dumps(done))
    while done < STEPS:
        step(model, optimizer, seed, done)
        done += 1
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / f"step-{done}")
        if rank == 0:
            unfinished = folder / "latest.unfinished"
            unfinished.write_text(json.dumps(done))
            unfinished.replace(latest)
    torch.save([whole(param) for param in model.parameters()], folder / "ends.pt")
    torch.distributed.destroy_process_group()


def run(folder: Path, seed: int) -> None:
    """Every life in turn, each but the last killed at some moment in its middle."""
    fork, moments = multiprocessing.get_context("fork"), random.Random(seed)
    latest = folder / "latest.json"
    for number, world in enumerate(LIVES):
        begun = json.loads(latest.read_text()) if latest.exists() else 0
        processes = [fork.Process(target=live, args=(rank, world, number, folder, seed)) for rank in range(world)]
        for process in processes:
            process.start()
        if number + 1 < len(LIVES):
            while not latest.exists() or json.loads(latest.read_text()) < begun + 3:
                time.sleep(0.005)
            time.sleep(moments.uniform(0.0, 0.05))
            for process in processes:
                process.kill()
        for process in processes:
            process.join()
