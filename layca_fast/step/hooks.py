"""torch's hooks around an optimizer's step: whether they run at all, and which pair of them is the outermost."""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.optim import Optimizer

#: The code that torch wraps around every class's ``step``, in which it calls the hooks: one for all classes.
_AROUND_STEP = Optimizer.profile_hook_step(lambda self: None).__code__

#: torch's dicts of hooks around a step.
STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def lacks_hooks(optimizer: Optimizer, needed: tuple[str, ...]) -> str | None:
    """Why hooks in these dicts of ``optimizer`` would not run, or None where they would.

    Wrappers that are optimizers by their type alone have not called torch's constructor: their ``step`` calls no hooks,
    and what some of them keep under these names are dicts of another kind.
    """
    # Of the class: schedulers and accelerate replace the step of the instance, and call this one.
    if not getattr(type(optimizer).step, "hooked", False):
        return "without step hooks"
    # Those of the instance: a __getattr__ would hand out those of the optimizer inside.
    held = vars(optimizer)
    return None if all(hasattr(held.get(name), "move_to_end") for name in needed) else "without hooks of its own"


def _steps_of(owner: object) -> Iterator[FrameType]:
    """The steps under way in this thread, innermost first, whose hooks are methods of ``owner``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _AROUND_STEP and _has_hooks_of(frame.f_locals.get("self"), owner):
            yield frame
        frame = frame.f_back


def _has_hooks_of(optimizer: Any, owner: object) -> bool:
    return any(
        getattr(hook, "__self__", None) is owner for name in STEP_HOOKS for hook in getattr(optimizer, name).values()
    )


def is_nested(owner: object) -> bool:
    """Inside of a step hook that is a method of ``owner``: whether the step around it is part of another such step.

    So it is where a class calls ``super().step()``, whose hooks torch runs twice if both classes have been used, where
    a closure takes a step, and where a wrapper shares the hooks of what it wraps. The stack is asked: a count of
    entries and exits would be wrong for ever after an exception, which skips the hooks after a step.
    """
    steps = _steps_of(owner)
    next(steps, None)
    return next(steps, None) is not None
