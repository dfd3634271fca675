"""An optimizer of several batches, whose steps the tests interrupt between and inside of them."""

import torch
from torch.nn import Parameter

from layca_fast import FusedLayca

from ..support import clones, parameter, params_of


def many_batches(backend: str, params: list[Parameter] | None = None) -> FusedLayca:
    """Batches of several bases and types, one of them with dampening: a first gradient is not as the others."""
    if params is None:
        dtypes = (torch.float32, torch.float64, torch.float32, torch.float32)
        params = [
            parameter(*shape, dtype=dtype)
            for shape, dtype in zip(((6, 5), (4, 3), (7, 2), (3, 0)), dtypes, strict=True)
        ]
    groups = [
        {"params": params[:1], "momentum": 0.9, "dampening": 0.5},
        {"params": params[1:2], "base": "adam"},
        {"params": params[2:3], "base": "rmsprop"},
        {"params": params[3:], "base": "adam"},
    ]
    return FusedLayca(groups, 0.05, backend=backend)


def twin(optimizer: FusedLayca, backend: str) -> FusedLayca:
    return many_batches(backend, clones(params_of(optimizer)))


class Injected(MemoryError):
    """What the tests raise."""
