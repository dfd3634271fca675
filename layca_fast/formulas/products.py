"""Products of stacks of matrices, (count, rows, columns), into memory that is there: torch's own, by the best road.

On the CPU large matrices are multiplied one after the other, since each product keeps all threads busy, and of a
product that is known to be symmetric only strips right of the diagonal are computed.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

#: Types that are exact enough for another order of products than the formula's.
EXACT = (torch.float32, torch.float64)

#: Matrices of so many rows are multiplied one by one on the CPU: smaller ones are faster in stacks, and whole.
LARGE = 320

#: Rows of a strip, at least, and strips of a matrix, at most: more of them leave out more, but each is slower.
STRIP, MOST_STRIPS = 128, 6


def multiply(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out = left right."""
    if not _one_by_one(out, left):
        return torch.bmm(left, right, out=out)
    for each, x, y in zip(out, left, right, strict=True):
        torch.mm(x, y, out=each)
    return out


def add_product(out: Tensor, old: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """out = beta old + alpha left right."""
    if not _one_by_one(out, left):
        return torch.baddbmm(old, left, right, beta=beta, alpha=alpha, out=out)
    for each, start, x, y in zip(out, old, left, right, strict=True):
        torch.addmm(start, x, y, beta=beta, alpha=alpha, out=each)
    return out


def multiply_symmetric(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The same as :func:`multiply` where the product is symmetric."""
    if not _in_strips(out, left):
        return multiply(out, left, right)
    for each, x, y in zip(out, left, right, strict=True):
        for first, end in _strips(len(each)):
            torch.mm(x[first:end], y[:, first:], out=each[first:end, first:])
            each[end:, first:end].copy_(each[first:end, end:].mT)
    return out


def add_product_symmetric(
    out: Tensor, old: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float = 1.0
) -> Tensor:
    """The same as :func:`add_product` where both ``old`` and the product are symmetric."""
    if not _in_strips(out, left):
        return add_product(out, old, left, right, beta, alpha)
    for each, start, x, y in zip(out, old, left, right, strict=True):
        for first, end in _strips(len(each)):
            strip, begin = each[first:end, first:], start[first:end, first:]
            torch.addmm(begin, x[first:end], y[:, first:], beta=beta, alpha=alpha, out=strip)
            each[end:, first:end].copy_(each[first:end, end:].mT)
    return out


def symmetric_share(rows: int) -> float:
    """The part that is computed of a symmetric product, of matrices with so many rows and as many columns or more."""
    return 1.0 if rows < LARGE else sum((end - first) * (rows - first) for first, end in _strips(rows)) / (rows * rows)


def _strips(rows: int) -> Iterator[tuple[int, int]]:
    count = max(1, min(MOST_STRIPS, rows // STRIP))
    return pairwise(rows * i // count for i in range(count + 1))


def _one_by_one(out: Tensor, left: Tensor) -> bool:
    # Never by the number of matrices: those that a matrix shares a stack with must not change its bits.
    # In bfloat16 torch's batched products round otherwise than those that torch.optim.Muon is made of.
    return out.device.type == "cpu" and (min(left.shape[1:]) >= LARGE or out.dtype not in EXACT)


def _in_strips(out: Tensor, left: Tensor) -> bool:
    # In bfloat16 the halves of what torch.optim.Muon computes need not be equal.
    return out.dtype in EXACT and _one_by_one(out, left)
