"""The tables of pairs that ``make test`` runs instead of whole products leave out no two options."""

from itertools import combinations, product
from random import Random

import pytest

from .backends.test_equivalence import cases
from .pairs import table_of_pairs


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (13, 2, 3, 2, 2), (4, 7, 1, 3)], ids=str)
def test_any_options_that_meet_in_the_product_meet_in_its_table(
    sizes: tuple[int, ...], together: int, seed: int
) -> None:
    every = [list(enumerate(map(str, row))) for row in product(*map(range, sizes))]
    rows = Random(seed).sample(every, 3 * len(every) // 4)
    taken = table_of_pairs(rows, together)
    met = [
        {each for number in numbers for each in combinations(rows[number], together)}
        for numbers in (taken, range(len(rows)))
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


@pytest.mark.parametrize("first", "abcd")
@pytest.mark.parametrize("second", [1.5, 2.5, 3.5])
@pytest.mark.parametrize("third", [(1, 2), {"a": 1}])
def test_lists_of_options_on_one_test_make_a_product(
    first: str, second: float, third: object, request: pytest.FixtureRequest
) -> None:
    """As collected just now: whatever pytest calls an option, a table of these 24 has few more than 4 x 3 rows."""
    function = request.node.nodeid.partition("[")[0]
    items = [item for item in request.session.items if item.nodeid.partition("[")[0] == function]
    assert sum(item.get_closest_marker("exhaustive") is None for item in items) <= 14
