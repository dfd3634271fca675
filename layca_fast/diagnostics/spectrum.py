"""Eigenvalues of second moments, and the float64 in which they are summed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements that are taken to float64 at a time, so that the scratch stays at 32 MiB however many samples there are.
PART = 2**22


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a positive semi-definite matrix: float64 of shape (d,), on the CPU, largest first.

    All are NaN where the matrix was not finite.
    """

    eigenvalues: Tensor

    @property
    def largest(self) -> float:
        """lambda_max."""
        return float(self.eigenvalues[0])

    def condition(self, p: float = 1.0) -> float:
        """kappa_p = lambda_max / lambda_ceil(p d), counted from the largest (Huang et al., ECCV 2020); p = 1: kappa.

        Infinite where that eigenvalue is zero to rounding (at most d times the float64 epsilon of lambda_max), as with
        fewer samples than dimensions; NaN where all are zero. Raises ValueError outside of 0 < p <= 1.
        """
        if not 0.0 < p <= 1.0:
            raise ValueError(f"p={p!r}: must lie in 0 < p <= 1, the share of the spectrum to look at")
        d = len(self.eigenvalues)
        # 0.07 * 100 is above 7 in floating point.
        chosen = float(self.eigenvalues[math.ceil(round(p * d, 9)) - 1])
        if chosen > d * torch.finfo(torch.float64).eps * self.largest:
            return self.largest / chosen
        return math.inf if self.largest > 0 else math.nan


def precise(tensor: Tensor) -> Tensor:
    """In float64, without a graph; on the CPU where the device has no float64."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device, torch.float64)


def spectrum_of(matrix: Tensor) -> Spectrum:
    """Of a symmetric positive semi-definite float64 matrix (d, d): O(d^3) operations; waits for the device."""
    if not bool(matrix.isfinite().all()):
        return Spectrum(torch.full((len(matrix),), math.nan, dtype=torch.float64, device="cpu"))
    # Rounding can leave the smallest below zero.
    return Spectrum(torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0.0).cpu())


class SecondMoment:
    """The sum of x x^T over samples x of length d, float64, and how many samples it is over."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.samples = 0

    def add(self, parts: Iterable[Tensor]) -> None:
        """Add samples: each part is (samples, d), of any floating type."""
        for part in parts:
            rows = precise(part)
            product = rows.T @ rows
            self.total = product if self.total is None else self.total.add_(product)
            self.samples += len(rows)

    def spectrum(self, *, undo_mean: bool = False) -> Spectrum | None:
        """Of the sum over m samples divided by m; or times m, for gradients of a mean over m. None without samples."""
        if self.total is None or self.samples == 0:
            return None
        return spectrum_of(self.total * (self.samples if undo_mean else 1 / self.samples))
