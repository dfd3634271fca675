"""What cases of sharded training share: where they run, and how weights of shards compare with whole ones."""

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from layca_fast import FusedLayca

from ..support import HANGS

STEPS = 4


@dataclass(frozen=True)
class Place:
    """Where a case runs."""

    rank: int
    world: int
    folder: Path
    seed: int

    def mesh(self) -> DeviceMesh:
        return init_device_mesh("cpu", (self.world,))


Case = Callable[[Place], None]

#: The sets of cases, each run by one worker: what `make test` runs, and what `make test-exhaustive` adds.
SETS = ("default", "exhaustive")

#: By name: the numbers of processes in each set, and the case.
_CASES: dict[str, tuple[dict[str, tuple[int, ...]], Case]] = {}


def on(*worlds: int, exhaustive: Sequence[int] = ()) -> Callable[[Case], Case]:
    """Run the case on these numbers of processes, and on others among the exhaustive tests."""

    def add(case: Case) -> Case:
        _CASES[case.__name__] = dict(zip(SETS, (worlds, tuple(exhaustive)), strict=True)), case
        return case

    return add


def cases_of(chosen: str, world: int) -> dict[str, Case]:
    return {name: case for name, (worlds, case) in _CASES.items() if world in worlds[chosen]}


def names(chosen: str) -> list[tuple[int, str]]:
    return [(world, name) for name, (worlds, _) in _CASES.items() for world in worlds[chosen]]


def start(rank: int, world: int, meeting: Path) -> None:
    """Make this process one of ``world``, which find one another through the file ``meeting``."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=HANGS)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timeout)


# What cases share.


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    return distribute_tensor(tensor.detach().clone(), mesh, placements, src_data_rank=None)


def off(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest distance of two weights, as a part of the norm."""
    pairs = [(whole(a).double(), whole(b).double()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def give(optimizer: FusedLayca, grads: Sequence[Tensor]) -> None:
    """One step by whole gradients, shared out as the parameters are."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        is_shared = isinstance(param, DTensor)
        param.grad = shared(grad, param.device_mesh, param.placements) if is_shared else grad.clone()
    optimizer.step()


def draw(params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn(param.shape) for param in params]


@contextmanager
def counting() -> Iterator[list[Tensor]]:
    """The tensors that are summed over processes meanwhile."""
    seen: list[Tensor] = []
    plain = dist.all_reduce

    def count(tensor: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(tensor)
        return plain(tensor, *args, **options)

    dist.all_reduce = count
    try:
        yield seen
    finally:
        dist.all_reduce = plain


def params_of(optimizer: FusedLayca) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def expect(kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=message):
        call()


# Checkpoints: two processes write what other numbers of them, and other backends, go on from.
