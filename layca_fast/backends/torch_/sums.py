"""Sums whose bits depend on neither the number of threads nor on what else is summed in the same call."""

import torch
from torch import Tensor

from .arithmetic import Value

#: Sums run over rows of this length first: torch's own full reductions split by the number of threads, so their bits
#: depend on it; sums along rows do not. Neither do products by BLAS keep their bits, of two vectors least of all.
ROW = 1024


def row_sums(x: Tensor) -> Tensor:
    """The sum of each row of ``x`` (rows, n), in an order that depends on n alone: (rows,)."""
    rows, n = x.shape
    while n > ROW:
        whole = n // ROW * ROW
        sums = x[:, :whole].reshape(rows, -1, ROW).sum(2)
        x = sums if whole == n else torch.cat((sums, x[:, whole:].sum(1, keepdim=True)), 1)
        n = x.shape[1]
    return x.sum(1)


def dots(w: Value, u: Value) -> Tensor:
    """n2, d and q of each row of ``w`` and ``u`` (rows, n): (rows, 3) float64.

    All three are sums of products in one order: where ``u`` is ``w`` they are equal, and so the angle between is 0.
    """
    w, u = w.to(torch.float64), u.to(torch.float64)
    sums = []
    for x, y in ((w, w), (w, u), (u, u)):
        # A value of its own: its memory is for others as soon as nothing holds it.
        products = x * y
        sums.append(row_sums(products.tensor))
    return torch.stack(sums, 1)
