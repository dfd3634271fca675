"""What every backend is: three verbs over a batch, and a word on where it runs."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch

from .batch import Batch


class Backend(ABC):
    """One way to run measure, coefficients and rotate. Stateless: all it works on is the batch.

    It reads hyperparameters and addresses from the tables on the device, where they may differ from what the host
    knows: under unscale_in_step a step is skipped by zeros in the column of gradients, which is all that a kernel has
    to heed. What goes by ``batch.grads`` instead must heed ``batch.taken``.

    ``tile`` is the number of elements that one partial sum covers. The order of summation follows from the tiles
    alone, so results do not depend on threads or on which other tensors share the batch.
    """

    name: str
    tile: int
    #: Whether a tensor's layers must lie in memory as one run, one after the other.
    needs_dense: bool = True
    #: Whether it writes to tensors by their addresses, which torch does not notice.
    writes_unseen: bool = True
    #: Whether what :meth:`call` returns is compiled code from end to end, which takes all of a step or none of it.
    is_native: bool = False

    @abstractmethod
    def missing(self) -> str | None:
        """Why this backend cannot run here at all, or None where it can."""

    @abstractmethod
    def refuses(self, device: torch.device) -> str | None:
        """Why an available backend cannot take tensors on ``device``, or None where it can."""

    @abstractmethod
    def measure(self, batch: Batch) -> None:
        """Advance the base optimizer's state (in place) and write ``batch.dots`` and the non-finite counts."""

    @abstractmethod
    def coefficients(self, batch: Batch) -> None:
        """From ``batch.dots``: write ``batch.coefficients``, the other counts, and radii on their first use."""

    @abstractmethod
    def rotate(self, batch: Batch) -> None:
        """Apply ``batch.coefficients`` to the parameters (in place)."""

    def reserve(self, batch: Batch) -> None:
        """Take the memory that :meth:`step` needs beside what it gives back at once. Modifies nothing."""
        batch.reserve()

    def call(self, batch: Batch) -> Callable[[], object]:
        """What takes the step of ``batch`` when it is called."""
        return partial(self.step, batch)

    def is_uninterrupted(self, batch: Batch) -> bool:
        """Whether what :meth:`call` returns is compiled code from end to end, which no signal interrupts."""
        return self.is_native

    def step(self, batch: Batch) -> None:
        """All three. A backend may override it with a schedule that keeps layers in cache between the verbs."""
        self.measure(batch)
        self.coefficients(batch)
        self.rotate(batch)
