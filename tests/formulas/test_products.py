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
    wide, start = torch.randn(3, rows, rows + 60, dtype=torch.float64), symmetric(3, rows)
    for left, right in ((wide, wide.mT), (start, start @ start)):
        out = torch.full_like(start, torch.nan)
        room = torch.full_like(start, torch.nan)
        assert products.multiply_symmetric(out, left, right, room) is out
        assert relative_distance(out, left @ right) < 1e-12
        out.fill_(torch.nan)
        assert products.add_product_symmetric(out, start, left, right, room, -0.7, 0.3) is out
        assert relative_distance(out, -0.7 * start + 0.3 * left @ right) < 1e-12


@pytest.mark.parametrize("rows", [330, 900])
def test_what_lies_left_of_the_diagonal_is_not_computed(rows: int, seed: int) -> None:
    """Of a product that is not symmetric after all, the right half comes out twice."""
    left, right, out, room = (torch.randn(1, rows, rows, dtype=torch.float64) for _ in range(4))
    products.multiply_symmetric(out, left, right, room)
    height = rows // products.STRIPS
    assert torch.equal(out[0, -1, :height], out[0, :height, -1])
    assert relative_distance(out[0, :height], (left @ right)[0, :height]) < 1e-12
    assert relative_distance(out[0, -1, :height], (left @ right)[0, -1, :height]) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [20, 330, 520])
def test_a_matrix_has_the_same_bits_in_any_stack(rows: int, dtype: torch.dtype, seed: int) -> None:
    wide = torch.randn(5, rows, rows + 60, dtype=torch.float64).to(dtype)

    def results(part: Tensor) -> list[Tensor]:
        gram, change, room = (part.new_full((len(part), rows, rows), torch.nan) for _ in range(3))
        products.multiply_symmetric(gram, part, part.mT, room)
        products.add_product_symmetric(change, gram, gram, gram, room, -0.7, 0.3)
        spare = products.multiply(torch.full_like(part, torch.nan), change, part)
        return [gram, change, spare, products.add_product(torch.empty_like(part), part, change, part, 3.0)]

    whole = results(wide)
    for first, end in ((0, 1), (1, 3), (2, 5), (4, 5)):
        for ours, theirs in zip(results(wide[first:end]), whole, strict=True):
            assert torch.equal(ours, theirs[first:end])


def test_how_much_is_left_out() -> None:
    assert products.symmetric_share(100) == products.symmetric_share(319) == 1.0
    assert products.symmetric_share(320) == products.symmetric_share(6144) == 0.625
