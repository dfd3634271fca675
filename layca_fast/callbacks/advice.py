"""What a callback knows and the optimizer does not: how long the training will be."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..formulas.bases import BASES, RATE_OF_AVERAGE, RATE_OF_ONE_STEP, recommended_rate, scaled_rate
from ..optimizer import FusedLayca

#: Below so many steps the measured runs of docs/learning_rate.md ("Short runs") did best near 3**-3.
SHORT_RUN = 1000


def _is_slow(group: Mapping[str, Any]) -> bool:
    """Whether a group has the recommended rate for long trainings, and none of its own."""
    if recommended_rate(BASES[group["base"]], group) != RATE_OF_AVERAGE:
        return False
    # Schedulers have begun to change lr, and keep what it was.
    lr = group.get("initial_lr", group["lr"])
    return not isinstance(lr, Tensor) and float(lr) == scaled_rate(RATE_OF_AVERAGE, group.get("lr_factor", 1))


def advise_rate(optimizers: Iterable[Any], total_steps: float) -> None:
    """Warn where ``lr=None`` has recommended a rate that is too small for a training of ``total_steps`` steps."""
    if not 0 < total_steps < SHORT_RUN:
        return
    for optimizer in optimizers:
        while not isinstance(optimizer, FusedLayca) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, FusedLayca) or not optimizer._lr_is_recommended:
            continue
        slow = [group["base"] for group in optimizer.param_groups if _is_slow(group)]
        if slow:
            warnings.warn(
                f"lr=None recommends 3**-5 = {RATE_OF_AVERAGE:.2g} under base={slow[0]!r}, and this training has only "
                f"{int(total_steps)} steps: such short ones did best near lr=3**-3 = {RATE_OF_ONE_STEP:.2g} "
                "(docs/learning_rate.md, short runs)",
                stacklevel=3,
            )
