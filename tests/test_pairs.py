"""The tables of pairs that ``make test`` runs instead of whole products leave out no two options."""

from itertools import combinations, product
from random import Random

import pytest

from .backends.test_equivalence import cases
from .pairs import table_of_pairs


@pytest.mark.parametrize("sizes", [(2, 2, 2), (13, 2, 3, 2, 2), (4, 7, 1, 3)], ids=str)
def test_any_two_options_that_meet_in_the_product_meet_in_its_table(sizes: tuple[int, ...], seed: int) -> None:
    every = [list(enumerate(map(str, row))) for row in product(*map(range, sizes))]
    rows = Random(seed).sample(every, 3 * len(every) // 4)
    taken = table_of_pairs(rows)
    met = [
        {pair for number in numbers for pair in combinations(rows[number], 2)} for numbers in (taken, range(len(rows)))
    ]
    assert met[0] == met[1]
    assert len(taken) <= len(rows)


def test_a_table_is_little_larger_than_its_two_longest_lists() -> None:
    rows = [[(str(place), choice) for place, choice in enumerate(case.choices)] for case in cases()]
    most, second = sorted((len(set(column)) for column in zip(*rows, strict=True)), reverse=True)[:2]
    assert most * second <= len(table_of_pairs(rows)) <= 1.2 * most * second


def test_of_a_product_of_two_nothing_is_left_out() -> None:
    rows = [[("a", one), ("b", other)] for one, other in product(range(3), range(4))]
    assert table_of_pairs(rows) == set(range(12))
