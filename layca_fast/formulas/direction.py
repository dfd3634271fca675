"""What a base is whose direction is no function of single elements, but of whole matrices.

Its formula advances the state element by element, as any does, and says what the direction is made of; a
:class:`Direction` then makes it, of many matrices of one shape at a time. A new one is one file like ``orthogonal.py``.
"""

from typing import Protocol

import torch
from torch import Tensor


class Direction(Protocol):
    """What makes directions of matrices, by the settings of a group: hashable, equal where the settings are."""

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""

    def room(self, count: int, rows: int, columns: int) -> int:
        """How many elements of scratch memory it takes for so many matrices of this shape."""

    def run(self, matrices: Tensor, norms: Tensor, scratch: Tensor) -> Tensor:
        """The directions of ``matrices`` (count, rows, columns), of :attr:`dtype`, with rows <= columns.

        ``norms``: the Frobenius norms, (count,) float64. ``scratch``: flat, of :meth:`room` elements at least.
        **Modifies both tensors**: the result lies in one of them, with the shape of ``matrices``. A matrix of zeros has
        a direction of zeros.
        """

    def gain(self, rows: int, columns: int) -> float:
        """What the direction of a weight matrix of this shape, before any transposition, is multiplied by."""
