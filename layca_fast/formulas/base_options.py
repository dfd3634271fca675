"""What each base optimizer accepts as options: every check raises an error that names the option and its value.

``check_<base>(group)`` looks at the options of a group under that base.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch

Options = Mapping[str, Any]

#: What a schedule sets may lie below zero by this much, and counts as zero: one that ends there misses it by rounding.
ROUNDING = 1e-9


def not_negative(value: Any) -> float:
    """A scheduled number, which :data:`ROUNDING` lets be a little below zero, as it is used."""
    return max(float(value), 0.0)


def _check_range(group: Options, name: str, low: float, high: float, interval: str) -> None:
    value = group[name]
    if not isinstance(value, Real) or not (low <= float(value) < high):
        raise ValueError(f"{name}={value!r}: must be a number in {interval}")


def _check_scheduled(group: Options, name: str, high: float, interval: str) -> None:
    _check_range(group, name, -ROUNDING, high, interval)


def _check_truth(group: Options, *names: str) -> None:
    for name in names:
        if group[name] not in (True, False):
            raise ValueError(f"{name}={group[name]!r}: must be True or False")


def _check_betas(group: Options) -> None:
    betas = group["betas"]
    if (
        not isinstance(betas, Sequence)
        or len(betas) != 2
        or not all(isinstance(beta, Real) and -ROUNDING <= float(beta) < 1.0 for beta in betas)
    ):
        raise ValueError(f"betas={betas!r}: must be two numbers in [0, 1)")


def _check_eps(group: Options) -> None:
    _check_range(group, "eps", 0.0, math.inf, "[0, inf)")


def check_sgd(group: Options) -> None:
    _check_scheduled(group, "momentum", math.inf, "[0, inf)")
    _check_truth(group, "nesterov")
    dampening, nesterov = group["dampening"], group["nesterov"]
    if not isinstance(dampening, Real) or not math.isfinite(dampening):
        raise ValueError(f"dampening={dampening!r}: must be a finite number")
    if nesterov and (group["momentum"] <= 0 or dampening != 0):
        raise ValueError(
            f"nesterov={nesterov!r} needs momentum > 0 and dampening = 0, not momentum={group['momentum']!r} and "
            f"dampening={dampening!r}; set those, or nesterov=False"
        )


def check_momentum(group: Options) -> None:
    _check_scheduled(group, "momentum", 1.0, "[0, 1)")


def check_rmsprop(group: Options) -> None:
    _check_scheduled(group, "alpha", 1.0, "[0, 1)")
    _check_scheduled(group, "momentum", math.inf, "[0, inf)")
    _check_eps(group)
    _check_truth(group, "centered")


def check_adagrad(group: Options) -> None:
    _check_range(group, "initial_accumulator_value", 0.0, math.inf, "[0, inf)")
    _check_eps(group)


def check_adam(group: Options) -> None:
    _check_betas(group)
    _check_eps(group)
    _check_truth(group, "amsgrad")


def check_lion(group: Options) -> None:
    _check_betas(group)
    if group["betas"][1] < 0.01:
        # The last average is taken from the new one, of which it must be a good part.
        raise ValueError(f"betas={group['betas']!r}: the second beta of lion must be at least 0.01")


#: Types that Newton-Schulz iterations may run in; None: see NewtonSchulz.of.
NS_DTYPES = (None, torch.bfloat16, torch.float32, torch.float64)

#: How plain Muon's step grows with the shape of the matrix: the names of torch.optim.Muon.
ADJUSTMENTS = (None, "original", "match_rms_adamw")


def check_muon(group: Options) -> None:
    check_momentum(group)
    _check_truth(group, "nesterov")
    _check_eps(group)
    steps, coefficients = group["ns_steps"], group["ns_coefficients"]
    if isinstance(steps, bool) or not isinstance(steps, Integral) or not 1 <= int(steps) < 100:
        raise ValueError(f"ns_steps={steps!r}: must be a whole number from 1 to 99, of Newton-Schulz iterations")
    if (
        not isinstance(coefficients, Sequence)
        or len(coefficients) != 3
        or not all(isinstance(each, Real) and math.isfinite(each) for each in coefficients)
    ):
        raise ValueError(
            f"ns_coefficients={coefficients!r}: must be three finite numbers (a, b, c), of which an iteration takes "
            "singular values s to a*s + b*s**3 + c*s**5"
        )
    for name, choices in (("ns_dtype", NS_DTYPES), ("adjust_lr", ADJUSTMENTS)):
        # By identity, too: a tensor is equal to nothing that could be told here.
        if not any(group[name] is each or (isinstance(each, str) and group[name] == each) for each in choices):
            raise ValueError(f"{name}={group[name]!r} is unknown: choose one of {list(choices)}")
