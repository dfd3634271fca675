"""A monitor on the steps of an optimizer, through torch's hooks."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..compat import not_compiled
from ..step.hooks import STEP_HOOKS, is_nested, lacks_hooks

if TYPE_CHECKING:
    from typing_extensions import Self


@not_compiled
def _stand_before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # A hook that is not compiled, before the step, keeps torch.compile from cutting up the code around the step, in
    # which is_nested could not tell where a step begins.
    pass


class AfterSteps(ABC):
    """What records after every step of the optimizer that it is attached to."""

    #: What the monitor was made for.
    _source: nn.Module | Optimizer

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []

    @abstractmethod
    def record(self, step: int | None = None) -> bool:
        """Say that a step was taken."""

    def attach(self, optimizer: Optimizer | None = None) -> "Self":
        """Record after every step of ``optimizer`` (None: the one that the monitor was made for); returns the monitor.

        Until :meth:`detach`, or the end of ``with monitor.attach(optimizer):``. Copies and pickles of the optimizer do
        not record. A step that GradScaler skips is no step, unless ``unscale_in_step`` leaves skipping to the kernels.
        """
        if optimizer is None and isinstance(self._source, Optimizer):
            optimizer = self._source
        if not isinstance(optimizer, Optimizer):
            kind = type(optimizer).__name__
            raise TypeError(f"optimizer is a {kind}: it must be the torch.optim.Optimizer whose steps are recorded")
        # accelerate's wrapper is an Optimizer by its type alone: the hooks are those of the one inside.
        inner: Any = optimizer
        while (lack := lacks_hooks(inner, STEP_HOOKS)) is not None:
            inner = getattr(inner, "optimizer", None)
            if not isinstance(inner, Optimizer):
                raise TypeError(
                    f"optimizer is a {type(optimizer).__name__} {lack}, as wrappers are that skip Optimizer.__init__: "
                    "attach to the optimizer inside it, or call record() after each step"
                )
        if self._hooks:
            raise ValueError("this monitor records the steps of an optimizer already: call detach() first")
        self._follow(inner)
        self._hooks = [
            inner.register_step_pre_hook(_stand_before_step),
            inner.register_step_post_hook(self._after_step),
        ]
        return self

    def _follow(self, optimizer: Optimizer) -> None:
        """Called with the optimizer that the monitor is attached to."""
        return

    def detach(self) -> None:
        """No longer record the steps of the optimizer. Does nothing where it does not."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @not_compiled
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not is_nested(self):
            self.record()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()
