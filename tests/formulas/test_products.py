"""Products that are known to be symmetric, computed in strips, beside the whole ones."""

import pytest
import torch
from torch import Tensor

from layca_fast.formulas import products

from ..support import relative_distance


def symmetric(count: int, rows: int) -> Tensor:
    matrices = torch.randn(count, rows, rows, dtype=torch.float64)
    return matrices + matrices.mT


@pytest.mark.parametrize("rows", [5, 128, 330, 400, 900])
def test_symmetric_products_are_the_whole_ones(rows: int, seed: int) -> None:
    """Into memory that held something else, of a matrix with its transpose and of matrices that commute."""
    wide, start = torch.randn(2, rows, rows + 60, dtype=torch.float64), symmetric(2, rows)
    for left, right in ((wide, wide.mT), (start, start @ start)):
        out = torch.full_like(start, torch.nan)
        assert products.multiply_symmetric(out, left, right) is out
        assert relative_distance(out, left @ right) < 1e-12
        out.fill_(torch.nan)
        assert products.add_product_symmetric(out, start, left, right, -0.7, 0.3) is out
        assert relative_distance(out, -0.7 * start + 0.3 * left @ right) < 1e-12


@pytest.mark.parametrize("rows", [330, 900])
def test_what_lies_left_of_the_diagonal_is_not_computed(rows: int, seed: int) -> None:
    """Of a product that is not symmetric after all, the right half comes out twice."""
    left, right, out = (torch.randn(1, rows, rows, dtype=torch.float64) for _ in range(3))
    products.multiply_symmetric(out, left, right)
    assert torch.equal(out[0, -1, :128], out[0, :128, -1])
    assert relative_distance(out[0, :128], (left @ right)[0, :128]) < 1e-12
    assert relative_distance(out[0, -1, :128], (left @ right)[0, -1, :128]) > 0.1


def test_how_much_is_left_out() -> None:
    assert products.symmetric_share(100) == products.symmetric_share(319) == 1.0
    assert products.symmetric_share(320) == 0.75
    assert products.symmetric_share(512) == 0.625
    assert products.symmetric_share(768) == products.symmetric_share(6144) == pytest.approx(7 / 12)
