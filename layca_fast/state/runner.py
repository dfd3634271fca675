"""What the state of an optimizer must know of whatever steps it, and nothing more: backends stand above."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch


class Runner(Protocol):
    """What takes the step of a tensor."""

    @property
    def name(self) -> str:
        """What a group calls it."""

    @property
    def needs_dense(self) -> bool:
        """Whether a tensor's layers must lie in memory as one run, one after the other."""

    @property
    def writes_unseen(self) -> bool:
        """Whether it writes to tensors by their addresses, which torch does not notice."""


Runs = TypeVar("Runs", bound=Runner)

#: Finds what a name in a group means for tensors on a device.
Choose = Callable[[str, torch.device], Runs]
