"""What the tests of ``attach`` share: torch's optimizers to attach to, and what a step did to each layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from layca_fast import attach
from layca_fast.commands.verify import layers_of
from layca_fast.state.compensation import HALVES

from ..support import parameter, params_of

#: Hyperparameters far from neutral, and no weight decay unless a test adds it.
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": SGD,
    "SGD, Nesterov": lambda params, **options: SGD(params, **{"momentum": 0.9, "nesterov": True, **options}),
    "AdamW": lambda params, **options: AdamW(params, **{"weight_decay": 0.0, **options}),
    "AdamW, foreach": lambda params, **options: AdamW(params, **{"weight_decay": 0.0, "foreach": True, **options}),
    "AdamW, fused": lambda params, **options: AdamW(params, **{"weight_decay": 0.0, "fused": True, **options}),
    "Adagrad": Adagrad,
    "RMSprop": lambda params, **options: RMSprop(params, **{"momentum": 0.5, "centered": True, **options}),
    "Adafactor": lambda params, **options: Adafactor(params, **{"weight_decay": 0.0, **options}),
}
if hasattr(torch.optim, "Muon"):
    # It came with torch 2.9.
    OPTIMIZERS["Muon"] = lambda params, **options: torch.optim.Muon(params, **{"weight_decay": 0.0, **options})

#: Every optimizer of torch whose step needs no closure and no sparse gradient.
ALL_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    **OPTIMIZERS,
    "Adam": lambda params, **options: Adam(params, **{"amsgrad": True, **options}),
    "NAdam": NAdam,
    "RAdam": RAdam,
    "Adamax": Adamax,
    "Adadelta": Adadelta,
    "Rprop": Rprop,
    "ASGD": ASGD,
}


def shapes_for(name: str) -> tuple[tuple[int, ...], ...]:
    """Muon takes matrices only."""
    return ((6, 5), (12, 7)) if name == "Muon" else ((6, 5), (7,), (4, 3, 2))


def all_layers(optimizer: Optimizer, chunks: int | str = 1) -> list[Tensor]:
    """Every layer of the tensors of two or more dimensions, in float64."""
    return [layer for param in params_of(optimizer) if param.dim() >= 2 for layer in layers_of(param, chunks)]


def new_params(name: str, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes_for(name)]


every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
every_optimizer = pytest.mark.parametrize("name", ALL_OPTIMIZERS)


def of_halves(make: Callable[..., Optimizer] = AdamW, **options: Any) -> Optimizer:
    """Attached, of a bfloat16 matrix and a bfloat16 vector."""
    optimizer = make([parameter(6, 5, dtype=torch.bfloat16), parameter(7, dtype=torch.bfloat16)], lr=0.02, **options)
    attach(optimizer)
    return optimizer
