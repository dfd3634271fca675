"""Products of stacks of matrices, (count, rows, columns), into memory that is there: torch's own, by the best road.

On the CPU a batched product gives each matrix to one thread, so the matrices of a stack that leave threads without work
are multiplied by themselves, by all threads. Of a product that is known to be symmetric only strips right of the
diagonal are computed. ``bench.muon`` measures what that brings.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

#: Types that are exact enough for another order of products than the formula's.
EXACT = (torch.float32, torch.float64)

#: Matrices of so many rows are cut into strips, and divided among threads, on the CPU.
LARGE = 320

#: Strips of a matrix: more of them leave out more, but each is slower.
STRIPS = 4


def multiply(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out = left right."""
    for part in _parts(out, left):
        _product(out[part], left[part], right[part])
    return out


def add_product(out: Tensor, old: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """out = beta old + alpha left right."""
    for part in _parts(out, left):
        _sum(out[part], old[part], left[part], right[part], beta, alpha)
    return out


def multiply_symmetric(out: Tensor, left: Tensor, right: Tensor, room: Tensor) -> Tensor:
    """The same as :func:`multiply` where the product is symmetric; ``room``: memory of as many numbers, overwritten."""
    if not _in_strips(out, left):
        return multiply(out, left, right)
    for part in _parts(out, left):
        for first, end, strip in _strips(out[part], room):
            torch.bmm(left[part, first:end], right[part, :, first:], out=strip)
            _put(out[part], first, end, strip)
    return out


def add_product_symmetric(
    out: Tensor, old: Tensor, left: Tensor, right: Tensor, room: Tensor, beta: float, alpha: float = 1.0
) -> Tensor:
    """The same as :func:`add_product` where both ``old`` and the product are symmetric, with ``room`` as above."""
    if not _in_strips(out, left):
        return add_product(out, old, left, right, beta, alpha)
    for part in _parts(out, left):
        for first, end, strip in _strips(out[part], room):
            begin = old[part, first:end, first:]
            torch.baddbmm(begin, left[part, first:end], right[part, :, first:], beta=beta, alpha=alpha, out=strip)
            _put(out[part], first, end, strip)
    return out


def symmetric_share(rows: int) -> float:
    """The part that is computed of a symmetric product, of matrices with so many rows and as many columns or more."""
    return 1.0 if rows < LARGE else sum((end - first) * (rows - first) for first, end in _bounds(rows)) / (rows * rows)


def _bounds(rows: int) -> Iterator[tuple[int, int]]:
    return pairwise(rows * i // STRIPS for i in range(STRIPS + 1))


def _strips(out: Tensor, room: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """First and end of each strip of the rows, and memory for it in one run: only then the product is batched."""
    count, rows, _ = out.shape
    for first, end in _bounds(rows):
        shape = count, end - first, rows - first
        yield first, end, room.view(-1)[: shape[0] * shape[1] * shape[2]].view(shape)


def _put(out: Tensor, first: int, end: int, strip: Tensor) -> None:
    """And its mirror image below the diagonal."""
    out[:, first:end, first:].copy_(strip)
    out[:, end:, first:end].copy_(strip[:, :, end - first :].mT)


def _parts(out: Tensor, left: Tensor) -> Iterator[slice]:
    """What of a stack is multiplied at once.

    In float32 and below a matrix has the same bits whatever it shares a stack with; MKL's float64 products depend on
    where it lies in memory, too.
    """
    count = len(out)
    if out.device.type != "cpu" or (out.dtype in EXACT and not _are_large(left)):
        yield slice(0, count)
        return
    # In bfloat16 torch's batched products round otherwise than those that torch.optim.Muon is made of.
    together = count - count % torch.get_num_threads() if out.dtype in EXACT else 0
    if together:
        yield slice(0, together)
    for number in range(together, count):
        yield slice(number, number + 1)


def _product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.device.type == "cpu" and out.dtype not in EXACT:
        torch.mm(left[0], right[0], out=out[0])
    else:
        torch.bmm(left, right, out=out)


def _sum(out: Tensor, old: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> None:
    if out.device.type == "cpu" and out.dtype not in EXACT:
        torch.addmm(old[0], left[0], right[0], beta=beta, alpha=alpha, out=out[0])
    else:
        torch.baddbmm(old, left, right, beta=beta, alpha=alpha, out=out)


def _are_large(left: Tensor) -> bool:
    return min(left.shape[1:]) >= LARGE


def _in_strips(out: Tensor, left: Tensor) -> bool:
    # In bfloat16 the halves of what torch.optim.Muon computes need not be equal.
    return out.device.type == "cpu" and out.dtype in EXACT and _are_large(left)
