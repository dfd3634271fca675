"""What the demo compares: each of the paper's five base optimizers as torch has it, and FusedLayca on the same base.

Each lr is the best of a grid in powers of 3 by the accuracy of one seed on 1,000 digits of a validation, which the demo
neither trains nor tests on. ``examples/demo_rates.py`` chose them; examples/results/demo_rates.csv has what it tried.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.optim import SGD, Adagrad, Adam, Optimizer, RMSprop

from ...backends import choose
from ...optimizer import FusedLayca
from .training import Contestant

#: The choice that stands for all of :data:`PAPER_BASES`.
ALL = "all"


@dataclass(frozen=True)
class PaperBase:
    """A base as torch has it: what it is called and what makes one; its best lr plain, and that of Layca on it."""

    label: str
    make: Callable[..., Optimizer]
    plain_rate: float
    layca_rate: float


#: By FusedLayca's name of the base. Labels are short enough for a table of 80 columns. SGD's dampening makes its
#: momentum an average, as in SGD_AMom (paper, section 4).
PAPER_BASES = {
    "sgd": PaperBase("torch.optim.SGD", SGD, 1.0, 3.0**-2),
    "sgd_amom": PaperBase("SGD, dampening 0.9", partial(SGD, momentum=0.9, dampening=0.9), 3.0, 3.0**-3),
    "rmsprop": PaperBase("torch RMSprop", RMSprop, 3.0**-5, 3.0**-2),
    "adam": PaperBase("torch Adam", Adam, 3.0**-4, 3.0**-3),
    "adagrad": PaperBase("torch Adagrad", Adagrad, 3.0**-2, 3.0**-2),
}


def contestants(
    base: str,
    backend: str,
    device: torch.device,
    plain_rate: float | None = None,
    layca_rate: float | None = None,
    rule: str = "layca",
) -> list[Contestant]:
    """The plain base and FusedLayca on it, each at the best lr of its grid unless ``..._rate`` says otherwise.

    The grid of FusedLayca is that of rule "layca" under every rule.
    """
    row = PAPER_BASES[base]
    name = "FusedLayca" if base == "sgd" else f"Layca on {base}"
    if rule != "layca":
        name = f"{rule.capitalize()} on {base}"
    make = partial(FusedLayca, base=base, rule=rule, backend=backend)
    return [
        Contestant(row.label, base, plain_rate or row.plain_rate, "-", row.make),
        Contestant(name, base, layca_rate or row.layca_rate, choose(backend, device).name, make),
    ]
