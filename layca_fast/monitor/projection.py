"""A seeded random projection of each layer onto a few thousand numbers, made anew from its seed at every use.

Of the elements of a layer, every ``size``-th one goes into the same number, each with a random sign of its own. That is
a linear map that keeps dot products in the mean (as CountSketch does, Charikar et al. 2002, here with buckets that are
remainders by a prime, so that a GPU adds them up in a fixed order). Signs are bits of an integer hash of the position,
so nothing is stored, torch's random state is not touched, and every device has the same.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.torch_ import row_sums
from ..state.layout import scalar_device

#: Elements that are signed and added up at a time, in about 16 bytes each: who sketches has no memory to spare.
BLOCK_ON_CPU, BLOCK_ELSEWHERE = 2**18, 2**22

#: Bits that one hash gives.
WORD = 32


def largest_prime(limit: int) -> int:
    """The largest prime that is at most ``limit`` >= 2."""
    return next(n for n in range(limit, 1, -1) if all(n % factor for factor in range(2, int(n**0.5) + 1)))


def _mixed(words: Tensor) -> Tensor:
    """An integer hash of 32-bit numbers held as int64, in which every bit of the input moves every bit of the output.

    Two rounds of xor-shift and multiplication; products of int64 wrap around, and of these the low 32 bits are right.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = ((words ^ (words >> shift)) * factor) & 0xFFFFFFFF
    return words ^ (words >> 16)


def sign_bits(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """Random signs of the elements from position ``first``, a multiple of WORD, as the sign bits of floats.

    (count,) int32: all other bits are zero.
    """
    words = torch.arange(first // WORD, -(-(first + count) // WORD), dtype=torch.int64, device=device)
    # Positions beyond 2**37 would repeat: no layer is as long.
    words = _mixed(_mixed(words & 0xFFFFFFFF) ^ key).to(torch.int32)
    bits = words.unsqueeze(1) << torch.arange(WORD, dtype=torch.int32, device=device)
    return bits.bitwise_and_(-(2**31)).flatten()[:count]


def key_of(seed: int, name: str, shard: Sequence[int]) -> int:
    """A 32-bit number that decides all signs of one shard of one layer."""
    return zlib.crc32(repr((seed, name, tuple(shard))).encode())


class Projection:
    """Projects layers; ``size`` is the prime number of numbers that a layer longer than that is projected onto."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._seed = seed

    def length(self, weight: Tensor, layers: int) -> int:
        """How many numbers each layer of ``weight`` gives: its elements as they are, where they are no more."""
        return min(self.size, weight.numel() // layers)

    def run(self, weight: Tensor, names: Sequence[str], shard: Sequence[int], out: Tensor) -> Tensor:
        """Write the projection of each layer of ``weight``, called ``names``, to ``out``, (layers, length) float32.

        Returns the squared norms of the layers themselves, (layers,) float64. Where a layer is not finite, so are both.
        """
        matrix = weight.reshape(len(out), -1).to(scalar_device(weight.device))
        if out.shape[1] == matrix.shape[1]:
            out.copy_(matrix)
            return row_sums(matrix.double().square())
        squares = torch.zeros(len(out), dtype=torch.float64, device=matrix.device)
        for layer, elements in enumerate(matrix):
            key = key_of(self._seed, names[layer], shard)
            sums, squares[layer] = self._project(elements, key, out.shape[1])
            out[layer] = sums
        return squares

    def _project(self, elements: Tensor, key: int, length: int) -> tuple[Tensor, Tensor]:
        sums = elements.new_zeros(length, dtype=torch.float64)
        square = elements.new_zeros((), dtype=torch.float64)
        block = BLOCK_ON_CPU if elements.device.type == "cpu" else BLOCK_ELSEWHERE
        # Whole rows of the sums, and whole words of the signs.
        step = max(block // (WORD * length), 1) * WORD * length
        for first in range(0, elements.numel(), step):
            part = elements[first : first + step]
            # Along columns, torch adds up in an order that does not depend on the number of threads.
            square += _fold(part.double().square(), length).sum(0).sum()
            flips = sign_bits(key, first, len(part), part.device)
            signed = (part.float().view(torch.int32) ^ flips).view(torch.float32)
            sums += _fold(signed, length).sum(0, dtype=torch.float64)
        return sums, square


def _fold(part: Tensor, length: int) -> Tensor:
    """(rows, length), the last row filled up with zeros."""
    missing = -len(part) % length
    if missing:
        part = torch.nn.functional.pad(part, (0, missing))
    return part.view(-1, length)
