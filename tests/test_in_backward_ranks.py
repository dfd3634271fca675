"""Stepping inside backward on two real processes: FSDP2 gives the ordinary weights, replicas are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from layca_fast import FusedLayca, in_backward

from .support import same_bits

RANKS = 2


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def replicated(rank: int, seed: int, bucket_view: bool) -> tuple[nn.Module, FusedLayca, Tensor]:
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
        model, optimizer, x = replicated(rank, seed, bucket_view)
        before = weights(model)
        with pytest.raises(RuntimeError, match="cannot work under DistributedDataParallel"):
            model(x).square().mean().backward()
        assert same_bits(weights(model), before)
        look, in_backward._check_not_replicated = in_backward._check_not_replicated, lambda params: None
        model, optimizer, x = replicated(rank, seed, bucket_view)
        model(x).square().mean().backward()
        with pytest.raises(RuntimeError, match="came after backward had stepped it"):
            optimizer.step()
        in_backward._check_not_replicated = look


def run(rank: int, file: str, seed: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    replicas_are_refused(rank, seed)
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_processes(seed: int, tmp_path: Path) -> None:
    arguments: tuple[Any, ...] = (str(tmp_path / "store"), seed)
    spawn(run, arguments, nprocs=RANKS)
