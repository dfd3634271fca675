"""Who makes the directions of matrices that several processes share."""

import random
from collections import Counter

import torch

from layca_fast.formulas.orthogonal import NewtonSchulz
from layca_fast.state.spread import Spread
from layca_fast.step.exchange import owners, wire_of, work


def spread(rows: int, columns: int, sizes: tuple[int, ...]) -> Spread:
    shape = (rows, columns)
    nothing = tuple(() for _ in sizes)
    return Spread((), sizes, tuple(0 for _ in sizes), nothing, shape, shape, rows, ((), ()))


def loads(spreads: list[Spread]) -> list[int]:
    found: Counter[tuple[int, ...]] = Counter()
    for each, owner in zip(spreads, owners(spreads), strict=True):
        found[owner] += work(*each.sides)
    return list(found.values())


def test_work_is_balanced(seed: int) -> None:
    """Within what the largest matrix leaves; a third above the even share, where matrices are many and alike."""
    draws = random.Random(seed)
    for _ in range(100):
        sizes = draws.choice([(2,), (3,), (4, 2), (2, 2, 2)])
        spreads = [spread(draws.randint(1, 64), draws.randint(1, 256), sizes) for _ in range(draws.randint(1, 80))]
        everyone = torch.Size(sizes).numel()
        total, largest = sum(work(*each.sides) for each in spreads), max(work(*each.sides) for each in spreads)
        # Graham's bound for the largest first.
        assert max(loads(spreads)) <= max(total / everyone * 4 / 3, total / everyone + largest)
    alike = [spread(32, 96, (4, 2)) for _ in range(40)]
    assert loads(alike) == [5 * work(32, 96)] * 8


def test_work_is_that_of_the_products_on_the_smaller_side() -> None:
    assert work(3, 100) == work(100, 3) == 3 * 3 * 100


def test_what_travels_is_the_narrower_type() -> None:
    for made, expected in ((torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)):
        direction = NewtonSchulz(5, (3.4445, -4.775, 2.0315), 1e-7, None, made)
        assert wire_of(torch.float32, direction) == expected
