"""FusedLayca among the optimizers that torch's own tests know: its tables of inputs and of errors, in our words."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    optim_db,
)

from layca_fast import FusedLayca
from layca_fast.formulas.bases import BASES

#: What runs the step of each of torch's optimizers; of all but AdamW weight decay is a part of the gradient.
AS_OURS = {"SGD": "sgd", "Adam": "adam", "AdamW": "adam", "RMSprop": "rmsprop", "Adagrad": "adagrad"}

#: How torch is to do the same: nothing that changes what is done.
HOW = {"foreach", "fused", "differentiable", "capturable"}


class Layca(FusedLayca):
    """FusedLayca with the arguments of one of torch's optimizers, whose plain step it takes under rotate=False."""

    #: Set by :func:`registered`.
    of_torch: type[torch.optim.Optimizer]
    backend: str

    def __init__(self, params: Any, lr: Any = None, **options: Any) -> None:
        theirs = {name: value for name, value in options.items() if name not in HOW}
        row = BASES[AS_OURS[self.of_torch.__name__]]
        super().__init__(params, lr, base=row.name, backend=self.backend, **theirs)


def registered(backend: str) -> list[OptimizerInfo]:
    """A row as those of torch's table for each of its optimizers that we have the step of."""
    rows = []
    for info in optim_db:
        name = info.optim_cls.__name__
        if name not in AS_OURS:
            continue
        kind = type(f"LaycaAs{name}", (Layca,), {"of_torch": info.optim_cls, "backend": backend})
        rows.append(
            OptimizerInfo(
                kind,
                optim_inputs_func=info.optim_inputs_func,
                optim_error_inputs_func=info.optim_error_inputs_func,
                scheduler_inputs=info.scheduler_inputs,
                supported_impls=(),
                supports_sparse=False,
                supports_complex=False,
            )
        )
    return rows


def unknown_options(info: OptimizerInfo, kwargs: dict[str, Any]) -> list[str]:
    """Options of torch's optimizer that ours has not, nor a way to do without."""
    base = BASES[AS_OURS[info.optim_cls.of_torch.__name__]]
    known = {"lr", "weight_decay", "maximize", *base.options, *HOW}
    return [name for name in kwargs if name not in known]


def inputs(info: OptimizerInfo) -> Iterator[OptimizerInput]:
    yield from info.optim_inputs_func("cpu", torch.float32)


def error_inputs(info: OptimizerInfo) -> Iterator[ErrorOptimizerInput]:
    yield from info.optim_error_inputs_func("cpu", torch.float32)
