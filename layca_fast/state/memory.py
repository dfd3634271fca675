"""Tensors that share memory without being the same object: a step would move what they share more than once.

Asked when a plan is made, so at the first step and whenever something lies elsewhere than before.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from math import gcd

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..compat import is_fake
from .checks import is_wrapper
from .layout import bytes_needed, is_dense
from .sharding import is_elsewhere, local_of

#: What is written to, and what to call it.
Written = tuple[Callable[[], str], Tensor]


def is_trained(param: Tensor) -> bool:
    """Whether a step may write to a parameter, and its memory is plain enough to ask where that is."""
    if not param.requires_grad and param.grad is None:
        return False
    local = local_of(param)
    if is_lazy(param) or is_wrapper(local) or local.layout != torch.strided or local.is_meta:
        return False
    return not is_elsewhere(param)


def _end(tensor: Tensor) -> int:
    """The address behind the last byte of a tensor that has elements."""
    return int(tensor.data_ptr() + bytes_needed(tensor) - tensor.storage_offset() * tensor.element_size())


def _clusters(tensors: Iterable[tuple[int, int, Written]]) -> Iterable[list[tuple[int, int, Written]]]:
    """Runs of (first address, end, tensor) whose addresses interleave, of two tensors or more."""
    cluster: list[tuple[int, int, Written]] = []
    end = 0
    for each in sorted(tensors, key=lambda entry: entry[:2]):
        if each[0] >= end:
            if len(cluster) > 1:
                yield cluster
            cluster = []
        cluster.append(each)
        end = max(end, each[1])
    if len(cluster) > 1:
        yield cluster


def _meeting(cluster: Sequence[tuple[int, int, Written]]) -> tuple[Written, Written] | None:
    """Two tensors of a cluster that have an address in common, if there are any: columns of one matrix have none."""
    if all(is_dense(tensor) for _, _, (_, tensor) in cluster):
        return cluster[0][2], cluster[1][2]
    start = cluster[0][0]
    unit = gcd(*(number for first, _, (_, tensor) in cluster for number in (first - start, tensor.element_size())))
    owners = torch.zeros((max(end for _, end, _ in cluster) - start) // unit, dtype=torch.int32, device="cpu")
    for number, (first, _, (_, tensor)) in enumerate(cluster, 1):
        units = tensor.element_size() // unit
        strides = [stride * units for stride in tensor.stride()]
        mine = owners.as_strided((*tensor.shape, units), (*strides, 1), (first - start) // unit)
        before = int(mine.max())
        if before:
            return cluster[before - 1][2], cluster[number - 1][2]
        mine.fill_(number)
    return None


def shared_memory(tensors: Sequence[Written]) -> tuple[str, str] | None:
    """What to call two plain, strided tensors that have a byte in common, if there are any; reads nothing of them."""

    def device_of(entry: Written) -> str:
        return str(entry[1].device)

    for _, group in groupby(sorted(tensors, key=device_of), device_of):
        # What has been freed lies nowhere.
        # A FakeTensor has no memory to share.
        real = [each for each in group if each[1].numel() > 0 and not is_fake(each[1])]
        there = [each for each in real if each[1].data_ptr() != 0]
        ranges = [(each[1].data_ptr(), _end(each[1]), each) for each in there]
        for cluster in _clusters(ranges):
            found = _meeting(cluster)
            if found is not None:
                return found[0][0](), found[1][0]()
    return None


def check_apart(tensors: Sequence[Written]) -> None:
    """Raise ValueError, naming both, for two tensors that a step would write to and that share memory."""
    found = shared_memory(tensors)
    if found is not None:
        raise ValueError(
            f"{found[0]} and {found[1]} share memory: a step would move what they share twice. Tie weights by "
            "assigning the parameter itself (head.weight = embedding.weight, not .data) and pass it once, or give each "
            "tensor memory of its own, parameter.data = parameter.data.clone()"
        )
