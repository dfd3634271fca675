"""What the demo compares: each of the paper's five base optimizers as torch has it, and FusedLayca on the same base."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.optim import SGD, Adagrad, Adam, Optimizer, RMSprop

from .backends import choose
from .bases import BASES, recommended_rate
from .demo_training import Contestant
from .optimizer import FusedLayca

#: The choice that stands for all of :data:`PLAIN_BASES`.
ALL = "all"


@dataclass(frozen=True)
class PlainBase:
    """A base without Layca: what it is called, what makes one, and its best lr on the demo's network."""

    label: str
    make: Callable[..., Optimizer]
    rate: float


#: By FusedLayca's name of the base. SGD's dampening makes its momentum an average, as in SGD_AMom (paper, section 4).
PLAIN_BASES = {
    "sgd": PlainBase("torch.optim.SGD", SGD, 1.0),
    "sgd_amom": PlainBase("SGD, dampening 0.9", partial(SGD, momentum=0.9, dampening=0.9), 1.0),
    "rmsprop": PlainBase("torch.optim.RMSprop", RMSprop, 3.0**-6),
    "adam": PlainBase("torch.optim.Adam", Adam, 3.0**-5),
    "adagrad": PlainBase("torch.optim.Adagrad", Adagrad, 3.0**-3),
}


def contestants(base: str, backend: str, device: torch.device, plain_rate: float | None = None) -> list[Contestant]:
    """The plain base, at its best lr unless ``plain_rate`` says otherwise, and FusedLayca on it at its default lr."""
    plain, row = PLAIN_BASES[base], BASES[base]
    name = "FusedLayca" if base == "sgd" else f"FusedLayca, {base}"
    return [
        Contestant(plain.label, base, plain.rate if plain_rate is None else plain_rate, "-", plain.make),
        Contestant(
            name,
            base,
            recommended_rate(row, row.options),
            choose(backend, device).name,
            partial(FusedLayca, base=base, backend=backend),
        ),
    ]
