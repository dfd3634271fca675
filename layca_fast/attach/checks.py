"""What Layca cannot be attached to."""

import inspect
from typing import Any

from torch.optim import Optimizer

from ..optimizer import FusedLayca
from ..step.hooks import lacks_hooks


def check_optimizer(optimizer: Any, hooks: tuple[str, ...]) -> None:
    """Raise TypeError for what Layca cannot be attached to; ``hooks`` are the dicts of hooks that it needs."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: it must be a torch.optim.Optimizer")
    name = type(optimizer).__name__
    if isinstance(optimizer, FusedLayca):
        raise TypeError(f"optimizer is a {name}, which rotates by itself: use it without attach")
    lack = lacks_hooks(optimizer, hooks)
    if lack is not None:
        raise TypeError(
            f"optimizer is a {name} {lack}, as wrappers are that skip Optimizer.__init__: attach to the optimizer "
            "inside it"
        )
    # Of the class: a learning rate scheduler replaces the method of the instance.
    arguments = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    needed = [each.name for each in arguments if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    if needed:
        raise TypeError(
            f"optimizer is a {name}, whose step needs {', '.join(needed)}: it takes many steps inside one, of which "
            "none could be turned; use an optimizer that takes one, such as torch.optim.SGD"
        )
