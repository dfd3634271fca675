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


def _square_sums(x: Tensor) -> Tensor:
    """The sum of squares of each row of ``x`` (rows, n) float64, in an order that depends on n alone: (rows,)."""
    rows, n = x.shape
    whole = n // ROW * ROW
    # A norm reads once, where products would be written and read again.
    if n <= ROW:
        norms: Tensor = torch.linalg.vector_norm(x, dim=1)
        return norms.square_()
    norms = torch.linalg.vector_norm(x[:, :whole].view(rows, -1, ROW), dim=2)
    if whole != n:
        norms = torch.cat((norms, torch.linalg.vector_norm(x[:, whole:], dim=1, keepdim=True)), 1)
    return row_sums(norms.square_())


def dots(w: Value, u: Value) -> Tensor:
    """n2, d and q of each row of ``w`` and ``u`` (rows, n): (rows, 3) float64."""
    w64, u64 = w.to(torch.float64), u.to(torch.float64)
    n2, q = _square_sums(w64.tensor), _square_sums(u64.tensor)
    # In place, where that is the place of a copy.
    products = (w * u).tensor if w64 is w else w64.tensor.mul_(u64.tensor)
    return torch.stack((n2, row_sums(products), q), 1)
