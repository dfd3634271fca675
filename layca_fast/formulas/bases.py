"""The table of base optimizers: which state they keep, which hyperparameters they take, which formula they run.

A base optimizer proposes the direction that Layca turns a layer in. Everything that is particular to one stands in
its row here, in ``formulas/`` and in ``csrc/base_steps.h``; the rest of the package knows no optimizer by name.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch

from . import base_steps
from .base_options import (
    check_adagrad,
    check_adam,
    check_lion,
    check_momentum,
    check_muon,
    check_rmsprop,
    check_sgd,
    not_negative,
)
from .direction import Direction
from .orthogonal import NewtonSchulz

Options = Mapping[str, Any]

#: States that are means or sums of squares, of which steps are made by division.
SQUARES = {"square_avg", "sum", "exp_avg_sq", "max_exp_avg_sq"}

#: The paper's recommended rotation rates (arXiv 1806.01603, section 4): where the direction is the gradient of one
#: step, and where it is averaged over steps.
RATE_OF_ONE_STEP, RATE_OF_AVERAGE = 3.0**-3, 3.0**-5

#: Muon's: see docs/learning_rate.md.
RATE_OF_MUON = 2.0**-4


@dataclass(frozen=True)
class Formula:
    """What a backend runs for one (base, flavour): compiled backends look it up by its name.

    ``states`` names the state buffers that it reads and writes, in the order of the formula's tuple; ``reads_grad``
    says whether the base step needs the gradient beside the advanced state, so whether rotate must load it again;
    ``counts_steps`` whether torch's optimizer keeps the number of steps in the state ``step``, so ours does;
    ``prepare`` makes this step's options from that number and the scalars of the group; ``admit`` puts 0 in the place
    of gradient elements that cannot be used; ``hides`` says whether states and step can be finite though one of these
    went in. ``direct``, of a group, its parameters' type and their device, says what makes directions of whole
    matrices, where the base steps are only what these are made of; None: the base step is the direction.
    """

    name: str
    advance: Callable[..., Any]
    step: Callable[..., Any]
    states: tuple[str, ...]
    reads_grad: bool
    counts_steps: bool = False
    prepare: Callable[..., Any] = base_steps.same_options
    admit: Callable[..., Any] = base_steps.finite_or_zero
    hides: bool = False
    direct: Callable[[Options, torch.dtype, torch.device], Direction] | None = None

    @property
    def are_squares(self) -> tuple[bool, ...]:
        """Of each state, whether it is of squares: it starts anew with the gradient's where one is not finite."""
        return tuple(name in SQUARES for name in self.states)


@dataclass(frozen=True)
class Base:
    """One base optimizer. Names, defaults and state keys are those of ``torch.optim``.

    ``formula(group)`` chooses what runs, ``scalars(group, fresh)`` makes the numbers it takes (``fresh``: the
    tensor's state was created in this very step), ``check(group)`` raises on values out of range, ``averages(group)``
    says whether the direction is averaged over steps, ``starts`` names the option that a new state buffer is filled
    with, where that is not zero, ``rate`` is what lr=None recommends, where it is not the paper's.
    """

    name: str
    options: Mapping[str, Any]
    formula: Callable[[Options], Formula]
    scalars: Callable[[Options, bool], tuple[float, ...]]
    check: Callable[[Options], None]
    averages: Callable[[Options], bool]
    starts: Mapping[str, str] = field(default_factory=dict)
    rate: float | None = None


def recommended_rate(base: Base, group: Options) -> float:
    """The base's own rotation rate, or the paper's: 3**-3 without averaging over steps, 3**-5 with."""
    if base.rate is not None:
        return base.rate
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


#: Every formula that some base runs, by name: what a compiled backend must offer.
FORMULAS: dict[str, Formula] = {}


def _formula(name: str, *states: str, reads_grad: bool, **more: Any) -> Formula:
    """The formula that ``formulas/`` has as ``<name>_advance`` and ``<name>_step``, listed in FORMULAS."""
    advance, step = getattr(base_steps, f"{name}_advance"), getattr(base_steps, f"{name}_step")
    FORMULAS[name] = Formula(name, advance, step, states, reads_grad, **more)
    return FORMULAS[name]


_SGD = _formula("sgd", reads_grad=True)
_MOMENTUM = _formula("sgd_momentum", "momentum_buffer", reads_grad=False)
_NESTEROV = _formula("sgd_nesterov", "momentum_buffer", reads_grad=True)
#: What torch's optimizers that square gradients have in common.
_SQUARES: Mapping[str, Any] = {"counts_steps": True, "admit": base_steps.finite_square_or_zero}
_RMSPROP = {
    (False, False): _formula("rmsprop", "square_avg", reads_grad=True, **_SQUARES),
    (True, False): _formula("rmsprop_centered", "square_avg", "grad_avg", reads_grad=True, **_SQUARES),
    (False, True): _formula("rmsprop_momentum", "square_avg", "momentum_buffer", reads_grad=False, **_SQUARES),
    (True, True): _formula(
        "rmsprop_centered_momentum", "square_avg", "grad_avg", "momentum_buffer", reads_grad=False, **_SQUARES
    ),
}
_ADAGRAD = _formula("adagrad", "sum", reads_grad=True, hides=True, **_SQUARES)
_OF_ADAM: Mapping[str, Any] = {"reads_grad": False, "prepare": base_steps.adam_prepare, **_SQUARES}
_ADAM = _formula("adam", "exp_avg", "exp_avg_sq", **_OF_ADAM)
_AMSGRAD = _formula("adam_amsgrad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", **_OF_ADAM)
_LION = _formula("lion", "exp_avg", reads_grad=True)
_MUON = _formula("muon", "momentum_buffer", reads_grad=True, direct=NewtonSchulz.of)


def _sgd_formula(group: Options) -> Formula:
    if group["momentum"] <= 0:
        return _SGD
    return _NESTEROV if group["nesterov"] else _MOMENTUM


def _sgd_scalars(group: Options, fresh: bool) -> tuple[float, ...]:
    if group["momentum"] <= 0:
        return ()
    # torch.optim.SGD copies the first gradient into the buffer undampened. Our buffer starts as zeros, so
    # weighting that gradient by 1 is the same.
    return (float(group["momentum"]), 1.0 if fresh else 1.0 - group["dampening"])


def _amom_scalars(group: Options, fresh: bool) -> tuple[float, ...]:
    momentum = not_negative(group["momentum"])
    return (momentum, 1.0 - momentum)


def _rmsprop_scalars(group: Options, fresh: bool) -> tuple[float, ...]:
    alpha = not_negative(group["alpha"])
    return (alpha, 1.0 - alpha, float(group["eps"]), not_negative(group["momentum"]))


def _adam_scalars(group: Options, fresh: bool) -> tuple[float, ...]:
    beta1, beta2 = map(not_negative, group["betas"])
    logs = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    return (1.0 - beta1, beta2, 1.0 - beta2, float(group["eps"]), *logs)


def _lion_scalars(group: Options, fresh: bool) -> tuple[float, ...]:
    beta1, beta2 = map(not_negative, group["betas"])
    return (1.0 - beta2, beta1 / beta2, (1.0 - beta1) - beta1 / beta2 * (1.0 - beta2))


def _muon_scalars(group: Options, fresh: bool) -> tuple[float, ...]:
    momentum = float(group["momentum"])
    return (1.0 - momentum, *((1.0 - momentum, momentum) if group["nesterov"] else (0.0, 1.0)))


BASES: Mapping[str, Base] = {
    base.name: base
    for base in (
        Base(
            "sgd",
            options={"momentum": 0.0, "dampening": 0.0, "nesterov": False},
            formula=_sgd_formula,
            scalars=_sgd_scalars,
            check=check_sgd,
            averages=lambda group: bool(group["momentum"] != 0),
        ),
        Base(
            "sgd_amom",
            options={"momentum": 0.9},
            formula=lambda group: _MOMENTUM,
            scalars=_amom_scalars,
            check=check_momentum,
            averages=lambda group: True,
        ),
        Base(
            "rmsprop",
            options={"alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False},
            formula=lambda group: _RMSPROP[bool(group["centered"]), group["momentum"] > 0],
            scalars=_rmsprop_scalars,
            check=check_rmsprop,
            averages=lambda group: bool(group["momentum"] != 0),
        ),
        Base(
            "adagrad",
            options={"eps": 1e-10, "initial_accumulator_value": 0.0},
            formula=lambda group: _ADAGRAD,
            scalars=lambda group, fresh: (float(group["eps"]),),
            check=check_adagrad,
            averages=lambda group: False,
            starts={"sum": "initial_accumulator_value"},
        ),
        Base(
            "adam",
            options={"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False},
            formula=lambda group: _AMSGRAD if group["amsgrad"] else _ADAM,
            scalars=_adam_scalars,
            check=check_adam,
            averages=lambda group: True,
        ),
        Base(
            "lion",
            options={"betas": (0.9, 0.99)},
            formula=lambda group: _LION,
            scalars=_lion_scalars,
            check=check_lion,
            averages=lambda group: True,
        ),
        Base(
            "muon",
            options={
                "momentum": 0.95,
                "nesterov": True,
                "ns_steps": 5,
                "ns_coefficients": (3.4445, -4.775, 2.0315),
                "eps": 1e-7,
                "ns_dtype": None,
                "adjust_lr": None,
            },
            formula=lambda group: _MUON,
            scalars=_muon_scalars,
            check=check_muon,
            averages=lambda group: True,
            rate=RATE_OF_MUON,
        ),
    )
}
