"""Where the rows of sharded tensors lie, beside torch's own cuts."""

import random
from math import prod

import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from layca_fast.state.spread import _runs

from ..support import TORCH


def test_runs_are_the_rows_that_torch_cuts(seed: int) -> None:
    """Uneven and empty ones, in turns, and one cut after the other."""
    draws = random.Random(seed)
    for _ in range(2000):
        size, parts = draws.randint(0, 20), [draws.randint(1, 4) for _ in range(draws.randint(0, 3))]
        factors = [draws.choice([1, 1, 2, 3]) for _ in parts]
        at = tuple(map(draws.randrange, parts))
        rows = torch.arange(size)
        if TORCH < (2, 10) and any(factor > 1 for factor in factors):
            # It refused to cut in turns what not every turn divides, and in 2.8 and 2.9 cut that in another way.
            size = prod(factors) * prod(parts)
            rows = torch.arange(size)
        for factor, count, place in zip(factors, parts, at, strict=True):
            placement = Shard(0) if factor == 1 else _StridedShard(0, split_factor=factor)
            rows = placement._split_tensor(rows, count, with_padding=False)[0][place]
        runs = _runs(size, tuple(zip(factors, parts, strict=True)), at)
        assert [row for first, count in runs for row in range(first, first + count)] == rows.tolist()
