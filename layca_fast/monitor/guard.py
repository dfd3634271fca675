"""What a monitor does about norms that are not those of their spheres: raise or warn, at the step that finds them."""

from collections.abc import Callable
from typing import Any

from ..formulas.options import check_choice
from ..messages import warn_caller
from ..step.norms import NormDrifts, NotSteppedError, check_limit

ON_DRIFT = ("raise", "warn")


def _check_of(optimizer: Any) -> Callable[[], NormDrifts] | None:
    """The ``check_norms`` of an optimizer, of the one inside of it, or of what is attached to either."""
    while optimizer is not None:
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
        for owner in (optimizer, *(getattr(hook, "__self__", None) for hook in hooks)):
            found: Callable[[], NormDrifts] | None = getattr(owner, "check_norms", None)
            if callable(found):
                return found
        optimizer = getattr(optimizer, "optimizer", None)
    return None


class Guard:
    """Checks the norms of optimizers after each step: ``limit``, the largest drift; ``on_drift``, what to do beyond."""

    def __init__(self, limit: float, on_drift: str) -> None:
        check_limit(limit, "check_norms")
        check_choice({"on_drift": on_drift}, "on_drift", ON_DRIFT)
        self._limit, self._on_drift = limit, on_drift
        self._optimizers: list[Any] = []
        self._told: set[str] = set()

    def watch(self, optimizer: Any) -> None:
        """Check this one, too."""
        if all(optimizer is not each for each in self._optimizers):
            self._optimizers.append(optimizer)

    def check(self, source: Any) -> None:
        """Raise or warn of what the last step has found; ``source``: what the monitor was made for. Waits for devices.

        Raises TypeError where no optimizer is known, or one that turns nothing.
        """
        optimizers = [each for each in (source, *self._optimizers) if hasattr(each, "param_groups")]
        if not optimizers:
            raise TypeError(
                f"check_norms={self._limit!r}: this monitor knows no optimizer whose radii it could compare with: make "
                "it of the optimizer, attach() it, or call guard(optimizer)"
            )
        for optimizer in optimizers:
            check = _check_of(optimizer)
            if check is None:
                raise TypeError(
                    f"check_norms={self._limit!r}: {type(optimizer).__name__} rotates nothing, so its layers have no "
                    "radii to compare with: use FusedLayca or layca_fast.attach, or leave check_norms out"
                )
            try:
                drifts = check()
            except NotSteppedError:
                # No step was taken: GradScaler has skipped it, or weights were loaded since.
                continue
            if self._on_drift == "raise":
                drifts.raise_if(self._limit)
            new = drifts.above(self._limit).keys() - self._told
            if new:
                # Once for each layer: where nobody mends it, every step would say so.
                self._told |= new
                warn_caller(drifts.message(self._limit) or "")

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the monitor records nobody's steps.
        return {**self.__dict__, "_optimizers": []}


def guard_of(limit: float | None, on_drift: str) -> Guard | None:
    """The guard that a monitor's arguments ask for."""
    check_choice({"on_drift": on_drift}, "on_drift", ON_DRIFT)
    return None if limit is None else Guard(limit, on_drift)
