"""Who makes the directions of matrices that several processes share."""

import random
from collections import Counter
from math import prod

import torch

from layca_fast.formulas.orthogonal import NewtonSchulz
from layca_fast.step.exchange import owners, wire_of, work


def loads(works: list[int], sizes: tuple[int, ...]) -> list[int]:
    found: Counter[tuple[int, ...]] = Counter()
    for each, owner in zip(works, owners(works, sizes), strict=True):
        found[owner] += each
    return list(found.values())


def test_work_is_balanced(seed: int) -> None:
    """Within what the largest matrix leaves; a third above the even share, where matrices are many and alike."""
    draws = random.Random(seed)
    for _ in range(100):
        sizes = draws.choice([(2,), (3,), (4, 2), (2, 2, 2)])
        works = [work(draws.randint(1, 64), draws.randint(1, 256)) for _ in range(draws.randint(1, 80))]
        even, largest = sum(works) / prod(sizes), max(works)
        # Graham's bound for the largest first.
        assert max(loads(works, sizes)) <= max(even * 4 / 3, even + largest)
    assert loads([7] * 40, (4, 2)) == [5 * 7] * 8


def test_work_is_that_of_the_products_on_the_smaller_side() -> None:
    assert work(3, 100) == work(100, 3) == 3 * 3 * 100


def test_what_travels_is_the_narrower_type() -> None:
    for made, expected in ((torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)):
        direction = NewtonSchulz(5, (3.4445, -4.775, 2.0315), 1e-7, None, made)
        assert wire_of(torch.float32, direction) == expected
