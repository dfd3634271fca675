"""What cases of matrices that travel share: how those are made, and what is counted of their journeys."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.formulas.orthogonal import NewtonSchulz

from .support import draw, give, params_of, shared

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
