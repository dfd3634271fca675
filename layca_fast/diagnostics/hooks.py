"""What the diagnostics share: forward passes watched through hooks, and a model that is used and left as it was."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..messages import describe

if TYPE_CHECKING:
    from typing_extensions import Self

#: What a diagnostic notes of one pass, while it runs; and what it makes of that for each layer.
Notes = TypeVar("Notes")
Result = TypeVar("Result")


def check_model(model: object) -> None:
    """Raise TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not a {type(model).__name__}")


def check_plain(name: str, param: Tensor) -> None:
    """Raise TypeError for a parameter that is shared out over processes, or another tensor with rules of its own."""
    if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(f"{describe(f'parameter {name!r}', param)} is a {type(param).__name__}: pass a plain model")


def _check_every(every: Any) -> None:
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 1:
        raise ValueError(f"every={every!r}: must be a whole number >= 1 (1 measures every forward pass)")


class PassWatcher(ABC, Generic[Notes, Result]):
    """Watches every k-th forward pass of a model, and the backward pass that follows it, through hooks.

    Counted are the passes with gradients enabled, from 0. Only eager models: a compiled graph has no hooks inside.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        check_model(model)
        _check_every(every)
        self._every = int(every)
        self._passes = 0
        self._noted: tuple[int, Notes] | None = None
        self._measuring: bool = False
        self._records: dict[int, dict[str, Result]] = {}
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._begin)]

    @abstractmethod
    def _new_notes(self) -> Notes:
        """For one pass."""

    @abstractmethod
    def _results(self, notes: Notes) -> dict[str, Result]:
        """Of the layers that the pass went through."""

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._measuring = torch.is_grad_enabled() and self._passes % self._every == 0
        if not torch.is_grad_enabled():
            return
        self._close()
        if self._measuring:
            self._noted = self._passes, self._new_notes()
        self._passes += 1

    @property
    def _notes(self) -> Notes | None:
        """Of the pass under way, if it is measured."""
        return self._noted[1] if self._measuring and self._noted is not None else None

    def _close(self) -> None:
        noted, self._noted = self._noted, None
        if noted is not None:
            self._records[noted[0]] = self._results(noted[1])

    @property
    def records(self) -> dict[int, dict[str, Result]]:
        """What was measured: number of the forward pass, then name of the layer.

        Reading it ends the present measurement, so read it after the backward pass; it waits for the device.
        """
        self._close()
        return self._records

    def remove(self) -> None:
        """End the present measurement and take all hooks off the model; ``records`` stay. Again: no effect."""
        self._close()
        self._measuring = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def first_of(values: Any, kwargs: Mapping[str, Any], what: str) -> Tensor:
    """The tensor that ``values``, of a call or its result, is or begins with; TypeError, naming ``what``, if none."""
    if isinstance(values, Sequence) and not isinstance(values, str):
        values = values[0] if len(values) > 0 else next(iter(kwargs.values()), None)
    if not isinstance(values, Tensor):
        raise TypeError(f"{what} is a {type(values).__name__}, or begins with one: it must be a tensor")
    return values


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Lend ``model`` out: its buffers are replaced by copies meanwhile, and torch's random states restored at the end.

    Gradients are enabled. Not kept: what modules hold outside of their buffers, such as counters in Python.
    """
    copies: dict[int, Tensor] = {}
    lent: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.is_cuda}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                lent.append((module._buffers, name, buffer))
                copies.setdefault(id(buffer), buffer.detach().clone())
    try:
        for buffers, name, buffer in lent:
            buffers[name] = copies[id(buffer)]
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
            yield
    finally:
        for buffers, name, buffer in lent:
            buffers[name] = buffer
