"""Muon's direction: the Newton-Schulz image of a matrix, which has its singular vectors, and singular values near 1.

One iteration takes X to a X + (b G + c G^2) X with G = X X^T, so every singular value s to a s + b s^3 + c s^5 (Jordan
et al., "Muon: An optimizer for hidden layers in neural networks", 2024, whose coefficients these are by default). All
products are torch's, over stacks of matrices of one shape.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import products
from .products import EXACT

#: Widths in heights from which it pays to iterate on G alone: X is then multiplied once for several iterations.
WIDE = 1.5

#: Iterations on G before it is made anew from X: rounding errors of its small eigenvalues grow by a^2 in each.
ITERATIONS_OF_GRAM = 3


@dataclass(frozen=True)
class NewtonSchulz:
    """``steps`` iterations on matrices divided by their norms, or by ``eps`` where these are smaller, in ``dtype``.

    ``adjust``: how the direction grows with the shape of the matrix, as in torch.optim.Muon.
    """

    steps: int
    coefficients: tuple[float, float, float]
    eps: float
    adjust: str | None
    dtype: torch.dtype

    @classmethod
    def of(cls, group: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> "NewtonSchulz":
        """By the options of a group, for parameters of this type and device."""
        a, b, c = map(float, group["ns_coefficients"])
        chosen = group["ns_dtype"]
        if chosen is None and dtype == torch.float64:
            chosen = dtype
        elif chosen is None:
            chosen = torch.float32 if device.type == "cpu" else torch.bfloat16
        return cls(int(group["ns_steps"]), (a, b, c), float(group["eps"]), group["adjust_lr"], chosen)

    def _iterates_on_gram(self, rows: int, columns: int) -> bool:
        return self.steps > 1 and columns >= WIDE * rows and self.dtype in EXACT

    def room(self, count: int, rows: int, columns: int) -> int:
        """For a second stack of matrices and the square ones of an iteration."""
        squares = 4 if self._iterates_on_gram(rows, columns) else 2
        return count * rows * (columns + squares * rows)

    def run(self, matrices: Tensor, norms: Tensor, scratch: Tensor) -> Tensor:
        """See :class:`layca_fast.formulas.direction.Direction`."""
        count, rows, columns = matrices.shape
        # With eps = 0, a matrix of zeros stays one.
        norms = norms.clamp(min=max(self.eps, torch.finfo(self.dtype).tiny))
        matrices.div_(norms.to(matrices.device, self.dtype).view(-1, 1, 1))
        spare = scratch[: matrices.numel()].view(matrices.shape)
        square = count * rows * rows
        squares = scratch[matrices.numel() :]
        on_gram = self._iterates_on_gram(rows, columns)
        parts = [squares[i * square : (i + 1) * square].view(count, rows, rows) for i in range(4 if on_gram else 2)]
        return self._on_gram(matrices, spare, parts) if on_gram else self._on_matrices(matrices, spare, parts)

    def _on_matrices(self, x: Tensor, spare: Tensor, squares: list[Tensor]) -> Tensor:
        a, b, c = self.coefficients
        gram, change = squares
        for _ in range(self.steps):
            products.multiply_symmetric(gram, x, x.mT, spare)
            products.add_product_symmetric(change, gram, gram, gram, spare, b, c)
            products.add_product(spare, x, change, x, a)
            x, spare = spare, x
        return x

    def _on_gram(self, x: Tensor, spare: Tensor, squares: list[Tensor]) -> Tensor:
        """The same: X_k = P_k ... P_1 X with P = a + b G + c G^2, and G_(k+1) = P G P: all symmetric, all commute."""
        a, b, c = self.coefficients
        gram, factor, product, temporary = squares
        for first in range(0, self.steps, ITERATIONS_OF_GRAM):
            count = min(ITERATIONS_OF_GRAM, self.steps - first)
            products.multiply_symmetric(gram, x, x.mT, spare)
            for i in range(count):
                polynomial = product if i == 0 else factor
                products.add_product_symmetric(polynomial, gram, gram, gram, spare, b, c)
                polynomial.diagonal(dim1=1, dim2=2).add_(a)
                if i > 0:
                    products.multiply_symmetric(temporary, factor, product, spare)
                    product, temporary = temporary, product
                if i + 1 < count:
                    products.multiply_symmetric(temporary, gram, polynomial, spare)
                    products.multiply_symmetric(gram, temporary, polynomial, spare)
            products.multiply(spare, product, x)
            x, spare = spare, x
        return x

    def gain(self, rows: int, columns: int) -> float:
        """See :class:`layca_fast.formulas.direction.Direction`."""
        if self.adjust == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / max(columns, 1)))
