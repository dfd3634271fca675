"""Stepping inside backward on two real processes: FSDP2 gives the ordinary weights, replicas are refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from layca_fast import FusedLayca, in_backward

from .support import same_bits

RANKS = 2


def weights(model: nn.Module) -> list[Tensor]:
    """Copies; of DTensors the part that lies here."""
    local = (getattr(param, "_local_tensor", param) for param in model.parameters())
    return [tensor.detach().clone() for tensor in local]


def sharded(rank: int, seed: int) -> None:
    """Bit for bit the weights of ordinary steps, with layers of odd sizes, accumulation and missing gradients."""

    def make() -> tuple[nn.Module, FusedLayca]:
        torch.manual_seed(seed)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(3)), nn.Linear(7, 1))
        for module in (*model, model):
            fully_shard(module)
        return model, FusedLayca(model.parameters(), 0.1, base="adam", weight_decay=0.1)

    ordinary, inside = make(), make()
    inside[1].step_in_backward()
    generator = torch.Generator().manual_seed(seed + 1 + rank)
    for step in range(6):
        x = torch.randn(3, 7, generator=generator)
        for model, optimizer in (ordinary, inside):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            for number in range(1 + step % 2):
                # FSDP2 adds up what it does not reduce yet, so only the last of these backward passes steps.
                model.set_requires_gradient_sync(number == step % 2)
                model(x * (1 + number)).square().mean().backward()
            if model is inside[0]:
                assert all(param.grad is None for param in model.parameters())
            elif step == 3:
                # Set by hand, and not on every rank: the ordinary step has such gradients, too.
                kept = [param.grad for param in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        assert same_bits(weights(inside[0]), weights(ordinary[0]))
    for (model, optimizer), missing in ((ordinary, rank), (inside, rank)):
        for number, (param, grad) in enumerate(zip(model.parameters(), kept, strict=True)):
            param.grad = None if number % RANKS == missing else grad
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(weights(inside[0]), weights(ordinary[0]))


def replica(rank: int, seed: int, bucket_view: bool) -> tuple[nn.Module, FusedLayca, Tensor]:
    """A replica that steps in backward, and data that the other rank does not have."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = FusedLayca(model.parameters(), 0.1)
    optimizer.step_in_backward()
    torch.manual_seed(seed + 1 + rank)
    return DistributedDataParallel(model, gradient_as_bucket_view=bucket_view), optimizer, torch.randn(3, 4)


def replicas_are_refused(rank: int, seed: int) -> None:
    """Before anything moves; and where nobody could have known, at the latest by step."""
    for bucket_view in (False, True):
        model, optimizer, x = replica(rank, seed, bucket_view)
        before = weights(model)
        with pytest.raises(RuntimeError, match="cannot work under DistributedDataParallel"):
            model(x).square().mean().backward()
        assert same_bits(weights(model), before)
        look, in_backward._check_not_replicated = in_backward._check_not_replicated, lambda params: None
        model, optimizer, x = replica(rank, seed, bucket_view)
        model(x).square().mean().backward()
        with pytest.raises(RuntimeError, match="came after backward had stepped it"):
            optimizer.step()
        in_backward._check_not_replicated = look


def run(rank: int, file: str, seed: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    sharded(rank, seed)
    replicas_are_refused(rank, seed)
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_processes(seed: int, tmp_path: Path) -> None:
    spawn(run, (str(tmp_path / "store"), seed), nprocs=RANKS)
