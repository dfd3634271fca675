"""Warnings that point at the user's own line, however many of torch's wrappers a call has come through."""

import sys
import warnings

#: Packages whose frames are not the user's: schedulers, GradScaler and profiling all wrap a step.
INSIDE = {"torch", "layca_fast"}


def warn_caller(message: str) -> None:
    """Issue a UserWarning at the first frame outside of torch and of this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
