"""Stacks and blocks of the torch backend decide how fast a step is, and no bit of it."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.backends.torch_ import runs
from layca_fast.backends.torch_.arithmetic import Value
from layca_fast.backends.torch_.memory import Pool
from layca_fast.backends.torch_.sums import ROW, dots
from layca_fast.commands.cases import BASE_OPTIONS

from ...support import clones, contents, directs, parameter, random_gradients, same_bits, train

#: Numbers of rows and lengths: below, at and above what vectors and rows of sums hold.
SHAPES = ((1, 1), (3, 1), (1, 2), (5, 3), (1, 7), (2, 31), (31, 33), (3, 1023), (2, 1025), (1, 2049), (7,), (2, 3, 5))

#: Matrix products, which directions are made of, are BLAS's.
ELEMENTWISE = [each for each in BASE_OPTIONS if not directs(each)]

FEW = ({"momentum": 0.9}, {"base": "adam", "amsgrad": True})


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def found(params: list[Parameter], grads: Any, options: dict[str, Any]) -> list[Any]:
    optimizer = FusedLayca(params, 0.1, backend="torch", **options)
    train(optimizer, grads)
    return contents(optimizer)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        *zip(FEW, (torch.float32, torch.bfloat16), strict=True),
        *(
            pytest.param(*each, marks=pytest.mark.exhaustive)
            for each in itertools.product(ELEMENTWISE, (torch.float32, torch.float64, torch.bfloat16, torch.float16))
        ),
    ],
    ids=str,
)
def test_a_tensor_in_a_stack_ends_as_it_does_alone(options: dict[str, Any], dtype: torch.dtype, seed: int) -> None:
    params = [parameter(*shape, dtype=dtype) for shape in SHAPES for _ in range(3)]
    grads = random_gradients(params, 2)
    # One of a stack is not finite, one is nearly parallel to its weights, one is missing at first.
    grads[1][0].fill_(float("nan"))
    grads[1][-1].copy_(params[-1].detach())
    together = clones(params)
    rows: list[list[Any]] = [list(row) for row in grads]
    rows[0][4] = None
    alone = [found([param], [[row[i]] for row in rows], options)[0] for i, param in enumerate(params)]
    assert same_bits(found(together, rows, options), alone)


@pytest.mark.parametrize("options", FEW, ids=str)
def test_the_number_of_threads_changes_no_bit(options: dict[str, Any], seed: int, threads: None) -> None:
    """Also where several share the work of one operation, whose parts end where they may."""
    params = [parameter(331, 997), *(parameter(211, 331) for _ in range(3))]
    grads = random_gradients(params, 2)
    ends = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        ends.append(found(clones(params), grads, options))
    assert same_bits(ends[1:], ends[:1] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dots_of_a_row_do_not_depend_on_the_others(dtype: torch.dtype, seed: int) -> None:
    """Whatever its length: torch takes other ways for few and short rows, and where rows have gaps between them."""
    pool = Pool()
    lengths = [*range(1, 40), *(ROW * k + more for k, more in itertools.product((1, 2, 4, 40), (-1, 0, 1, 5)))]
    for length in lengths:
        w, u = (torch.randn(9, length + 3, dtype=dtype) for _ in range(2))
        gaps = dots(Value(pool, w[:, :length]), Value(pool, u[:, :length]))
        w, u = w[:, :length].contiguous(), u[:, :length].contiguous()
        alone = torch.cat([dots(Value(pool, w[i : i + 1]), Value(pool, u[i : i + 1])) for i in range(9)])
        for count in (2, 4, 5, 9):
            assert same_bits(dots(Value(pool, w[:count]), Value(pool, u[:count])), alone[:count]), (length, count)
        assert same_bits(gaps, alone), length


def test_dots_are_of_float64(seed: int) -> None:
    """Against exact sums of integers, which float32 could not hold."""
    w, u = (torch.randint(-(2**20), 2**20, (3, 5000)) for _ in range(2))
    exact = torch.stack([(w * w).sum(1), (w * u).sum(1), (u * u).sum(1)], 1).double()
    made = dots(Value(Pool(), w.float()), Value(Pool(), u.float()))
    torch.testing.assert_close(made, exact, rtol=1e-15, atol=1e-15 * float(exact.abs().max()))


def test_windows_change_no_bit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are measured and rotated window by window, and ends are the same as of all at once."""
    params = [parameter(9, 11), parameter(40, 7), parameter(9, 11), parameter(13)]
    grads = random_gradients(params, 3)
    whole = found(clones(params), grads, FEW[1])
    for name in ("WINDOW", "SMALL"):
        monkeypatch.setattr(runs, name, 1)
        assert same_bits(found(clones(params), grads, FEW[1]), whole), name
