"""A table of pairs of each product of three or more choices: ``make test`` runs it, and any two options meet in it.

A fault that hangs on one option, or on two of them together, shows there; one that takes three may show only in
``make test-exhaustive``, which runs the rest of the product. (Kuhn, Wallace and Gallo, IEEE TSE 2004: in programs of
four fields, two options together brought out 70 to 97 % of the faults.)

The interpreter of Triton is hundreds of times slower than what it stands for: of a product, it takes every option once
in ``make test``, and the rest in ``make test-exhaustive``.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import pytest

from layca_fast.commands.cases import Case, interpreting

Choice = tuple[str, int]


@dataclass(frozen=True)
class ChosenCase(Case):
    """A case that is one of a product, on one backend: ``choices`` numbers the option taken of each list.

    Backends are different code: each has a table of its own.
    """

    backend: str = ""
    choices: tuple[int, ...] = ()


def choices_of(item: pytest.Function) -> list[Choice]:
    """Which value of each parameter a test is run with, by a number that only the same value has."""
    numbers: dict[str, int] = {}
    for name, value in item.callspec.params.items():
        if isinstance(value, ChosenCase):
            numbers |= {f"{name}.{place}": choice for place, choice in enumerate(value.choices)}
        else:
            # pytest's own indices will not do: in version 9 they number the rows of the product.
            numbers[name] = id(value)
    return sorted(numbers.items())


def table_of_pairs(rows: Sequence[Sequence[Choice]], together: int = 2) -> set[int]:
    """Which rows to take so that every two choices (or ``together``) that meet in any row meet in one that is taken."""
    pairs = [set(combinations(row, together)) for row in rows]
    missing = set().union(*pairs)
    # Greedy: next the row with most pairs that are still missing. Their number only falls, so that old ones bound it.
    queue = [(-len(each), number) for number, each in enumerate(pairs)]
    heapq.heapify(queue)
    taken: set[int] = set()
    while missing:
        _, number = heapq.heappop(queue)
        found = len(pairs[number] & missing)
        if queue and found < -queue[0][0]:
            heapq.heappush(queue, (-found, number))
            continue
        taken.add(number)
        missing -= pairs[number]
    return taken


def product_of(item: pytest.Function) -> tuple[str, str]:
    """What the table is made for: the test function and the backend, of chosen cases or where it is interpreted."""
    params = item.callspec.params
    backends = [value.backend for value in params.values() if isinstance(value, ChosenCase)]
    if params.get("backend") == "triton" and interpreting():
        backends.append("triton")
    return item.nodeid.partition("[")[0], "".join(backends)


def mark_beyond_pairs(items: Sequence[pytest.Item]) -> None:
    """Mark as exhaustive what the table of pairs of its product leaves out."""
    products: dict[tuple[str, str], list[pytest.Function]] = defaultdict(list)
    for item in items:
        apart = any(item.get_closest_marker(name) for name in ("gpu", "exhaustive"))
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and not apart:
            products[product_of(item)].append(item)
    for (_, backend), product in products.items():
        rows = [choices_of(item) for item in product]
        if len(rows[0]) > 2:
            taken = table_of_pairs(rows, 1 if backend == "triton" and interpreting() else 2)
            for number, item in enumerate(product):
                if number not in taken:
                    item.add_marker(pytest.mark.exhaustive)
