"""The table of base optimizers: which state they keep, which hyperparameters they take, which formula they run.

A base optimizer proposes the direction that Layca turns a layer in. Everything that is particular to one stands in
its row here, in ``formulas.py`` and in ``csrc/base_steps.h``; the rest of the package knows no optimizer by name.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from . import formulas

Options = Mapping[str, Any]

#: The paper's recommended rotation rates (arXiv 1806.01603, section 4): where the direction is the gradient of one
#: step, and where it is averaged over steps.
RATE_OF_ONE_STEP, RATE_OF_AVERAGE = 3.0**-3, 3.0**-5


@dataclass(frozen=True)
class Formula:
    """What a backend runs for one (base, flavour): compiled backends look it up by its name.

    ``states`` names the state buffers that it reads and writes, in the order of the formula's tuple; ``reads_grad``
    says whether the base step needs the gradient beside the advanced state, so whether rotate must load it again.
    """

    name: str
    advance: Callable[..., Any]
    step: Callable[..., Any]
    states: tuple[str, ...]
    reads_grad: bool


@dataclass(frozen=True)
class Base:
    """One base optimizer. Names, defaults and state keys are those of ``torch.optim``.

    ``formula(group)`` chooses what runs, ``scalars(group, fresh)`` makes the numbers it takes (``fresh``: the
    tensor's state was created in this very step), ``check(group)`` raises on values out of range, ``averages(group)``
    says whether the direction is averaged over steps.
    """

    name: str
    options: Mapping[str, Any]
    formula: Callable[[Options], Formula]
    scalars: Callable[[Options, bool], tuple[float, ...]]
    check: Callable[[Options], None]
    averages: Callable[[Options], bool]


def recommended_rate(base: Base, group: Options) -> float:
    """The paper's rotation rate for this base: 3**-3 without averaging over steps, 3**-5 with."""
    return RATE_OF_AVERAGE if base.averages(group) else RATE_OF_ONE_STEP


def scaled_rate(lr: Any, factor: Any) -> Any:
    """``lr * factor``, a tensor as a new tensor; at factor 1 ``lr`` itself, so that tensors stay shared.

    Raises TypeError or ValueError for a factor that is no finite number >= 0.
    """
    if not isinstance(factor, Real):
        raise TypeError(f"lr_factor={factor!r}: must be a number")
    if not (0.0 <= float(factor) < math.inf):
        raise ValueError(f"lr_factor={factor!r}: must be finite and >= 0; it multiplies the lr of its group")
    return lr if factor == 1 else lr * float(factor)


def _check_range(group: Options, name: str, low: float, high: float, interval: str) -> None:
    value = group[name]
    if not isinstance(value, Real) or not (low <= float(value) < high):
        raise ValueError(f"{name}={value!r}: must be a number in {interval}")


def _check_sgd(group: Options) -> None:
    _check_range(group, "momentum", 0.0, math.inf, "[0, inf)")
    dampening, nesterov = group["dampening"], group["nesterov"]
    if not isinstance(dampening, Real) or not math.isfinite(dampening):
        raise ValueError(f"dampening={dampening!r}: must be a finite number")
    if nesterov not in (True, False):
        raise ValueError(f"nesterov={nesterov!r}: must be True or False")
    if nesterov and (group["momentum"] <= 0 or dampening != 0):
        raise ValueError(
            f"nesterov={nesterov!r} needs momentum > 0 and dampening = 0, not momentum={group['momentum']!r} and "
            f"dampening={dampening!r}; set those, or nesterov=False"
        )


def _check_momentum(group: Options) -> None:
    _check_range(group, "momentum", 0.0, 1.0, "[0, 1)")


_SGD = Formula("sgd", formulas.sgd_advance, formulas.sgd_step, (), reads_grad=True)
_MOMENTUM = Formula(
    "sgd_momentum",
    formulas.sgd_momentum_advance,
    formulas.sgd_momentum_step,
    ("momentum_buffer",),
    reads_grad=False,
)
_NESTEROV = Formula(
    "sgd_nesterov",
    formulas.sgd_momentum_advance,
    formulas.sgd_nesterov_step,
    ("momentum_buffer",),
    reads_grad=True,
)


def _sgd_formula(group: Options) -> Formula:
    if group["momentum"] == 0:
        return _SGD
    return _NESTEROV if group["nesterov"] else _MOMENTUM


def _sgd_scalars(group: Options, fresh: bool) -> tuple[float, ...]:
    if group["momentum"] == 0:
        return ()
    # torch.optim.SGD copies the first gradient into the buffer undampened. Our buffer starts as zeros, so
    # weighting that gradient by 1 is the same.
    return (float(group["momentum"]), 1.0 if fresh else 1.0 - group["dampening"])


BASES: Mapping[str, Base] = {
    base.name: base
    for base in (
        Base(
            "sgd",
            options={"momentum": 0.0, "dampening": 0.0, "nesterov": False},
            formula=_sgd_formula,
            scalars=_sgd_scalars,
            check=_check_sgd,
            averages=lambda group: bool(group["momentum"] != 0),
        ),
        Base(
            "sgd_amom",
            options={"momentum": 0.9},
            formula=lambda group: _MOMENTUM,
            scalars=lambda group, fresh: (float(group["momentum"]), 1.0 - group["momentum"]),
            check=_check_momentum,
            averages=lambda group: True,
        ),
    )
}

#: Every formula that some base runs, by name: what a compiled backend must offer.
FORMULAS: Mapping[str, Formula] = {formula.name: formula for formula in (_SGD, _MOMENTUM, _NESTEROV)}
