"""``python -m bench.attach_error``: how far rounding turns the base step that ``attach`` sees.

``attach`` takes the base step as u = w_before - w_after. Storing w_after in float32 rounds each element by at most
eps/2 of itself, so u is off by an angle of at most eps/2 * |w|/|u|. The step of the first table is that of
torch.optim.SGD on normally distributed weights and gradients; the true one is computed in float64.

The second table is about 16-bit parameters: ways to read the step of torch.optim.AdamW, each in a run of many steps on
the same 16-bit gradients, beside a run in float64. All but the last keep remainders (layca_fast/state/compensation.py).
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from layca_fast import attach
from layca_fast.commands.verify import angle_between
from layca_fast.figures.console import print_table
from layca_fast.reference import layca
from layca_fast.state.compensation import HALVES, join, split

EPS = torch.finfo(torch.float32).eps


def direction_error(ratio: float, size: int) -> float:
    """The angle in radians between the step of SGD and what float32 weights show of it, at |u|/|w| = ``ratio``."""
    param = Parameter(torch.randn(size))
    param.grad = torch.randn(size)
    param.grad *= ratio * param.detach().norm() / param.grad.norm()
    before = param.detach().clone()
    SGD([param], lr=1.0).step()
    return angle_between(param.grad.double(), (before - param.detach()).double())


def adamw(param: Tensor, lr: float) -> AdamW:
    """Without decay, which would only be projected away."""
    return AdamW([param], lr=lr, weight_decay=0.0)


@dataclass
class Run:
    """A layer of ``dtype``, turned by lr a step; ``weight()`` is what it stands for, ``errors`` what is asked of it."""

    start: Tensor
    dtype: torch.dtype
    lr: float
    #: The angles between its base steps and the true ones.
    errors: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.param = Parameter(self.start.to(self.dtype, copy=True))
        self.rest = torch.zeros_like(self.param)
        self.radius = float(self.param.detach().double().norm())
        self.optimizer = self.make()

    def make(self) -> AdamW:
        return adamw(self.param, self.lr)

    def weight(self) -> Tensor:
        return join(self.param.detach(), self.rest).double()

    def base_step(self, grad: Tensor) -> Tensor:
        """What the optimizer's step on this gradient looks like from outside: asked where ``step`` is the one below."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, grad: Tensor, true_step: Tensor) -> None:
        # As in FusedLayca: with a denominator that 16 bits cannot tell from zero, some elements are no numbers.
        before, seen = self.weight(), self.base_step(grad).nan_to_num(0.0, 0.0, 0.0)
        self.errors.append(angle_between(true_step, seen) if seen.any() else math.nan)
        self.store(layca(before, seen, self.lr, self.radius))

    def store(self, weight: Tensor) -> None:
        param, rest = split(weight.float(), self.dtype)
        self.param.copy_(param)
        self.rest.copy_(rest)


class Difference(Run):
    """The optimizer steps the 16-bit parameter."""

    def base_step(self, grad: Tensor) -> Tensor:
        before = self.param.detach().double()
        self.param.grad = grad
        self.optimizer.step()
        return before - self.param.detach().double()


class FromZero(Run):
    """The optimizer steps a 16-bit parameter of zeros, so that its step is all there is to round."""

    def base_step(self, grad: Tensor) -> Tensor:
        self.param.zero_()
        self.param.grad = grad
        self.optimizer.step()
        return -self.param.detach().double()


class OnFloat32(Run):
    """The optimizer steps a float32 copy by a float32 gradient, and has float32 moments: what ``attach`` does."""

    def make(self) -> AdamW:
        self.copy = Parameter(self.param.detach().float())
        return adamw(self.copy, self.lr)

    def base_step(self, grad: Tensor) -> Tensor:
        before = self.weight()
        self.copy.copy_(before)
        self.copy.grad = grad.float()
        self.optimizer.step()
        return before - self.copy.detach().double()


class WithoutRemainder(OnFloat32):
    """The same, where the weights are rounded to 16 bits after every step."""

    def store(self, weight: Tensor) -> None:
        self.param.copy_(weight)


class Attached(Run):
    """``attach`` itself."""

    def make(self) -> AdamW:
        made = super().make()
        self.handle = attach(made, rotate=True)
        return made

    def weight(self) -> Tensor:
        return self.handle.effective_weight(self.param).double()

    def step(self, grad: Tensor, true_step: Tensor) -> None:
        self.param.grad = grad
        self.optimizer.step()


#: Name; bytes a weight that it keeps beside what a plain 16-bit run has: a remainder, a copy of the weights, the wider
#: half of two float32 moments; and bytes for float32 gradients while it steps.
WAYS: Sequence[tuple[str, Callable[..., Run], int, int]] = (
    ("16-bit difference", Difference, 2 + 2, 0),
    ("16-bit step from zero", FromZero, 2 + 2, 0),
    ("float32 copy, no remainder", WithoutRemainder, 4 + 4, 4),
    ("float32 copy", OnFloat32, 2 + 4 + 4, 4),
    ("attach", Attached, 2 + 4 + 4, 4),
)


def _shown(error: float) -> str:
    return "no step" if math.isnan(error) else f"{error:.1e}"


def ways(dtype: torch.dtype, lr: float, size: int, steps: int) -> list[list[str]]:
    """Rows of the second table. Weights are normally distributed, of such a size that |u|/|w| is about lr."""
    start = torch.randn(size).to(dtype)
    runs = [make(start, dtype, lr) for _, make, *_ in WAYS]
    # Half of a gradient stays, the rest is noise: moments of 16 bits have something to lose.
    constant = torch.randn(size)
    true = Parameter(start.double())
    optimizer = adamw(true, lr)
    radius = float(true.detach().norm())
    for _ in range(steps):
        grad = (constant + torch.randn(size)).to(dtype)
        before = true.detach().clone()
        true.grad = grad.double()
        optimizer.step()
        true_step = before - true.detach()
        with torch.no_grad():
            true.copy_(layca(before, true_step, lr, radius))
        for run in runs:
            run.step(grad, true_step)
    rows = []
    for (name, _, kept, stepping), run in zip(WAYS, runs, strict=True):
        errors = [_shown(run.errors[0]), _shown(run.errors[-1])] if run.errors else ["", ""]
        numbers = angle_between(true.detach(), run.weight()), abs(float(run.weight().norm()) / radius - 1)
        rows.append([name, str(kept), str(stepping), *errors, *(f"{number:.1e}" for number in numbers)])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row per ratio, and one per way to read the step of 16-bit parameters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1_000_000, help="weights (default 1,000,000)")
    parser.add_argument("--steps", type=int, default=1_000, help="of the runs in 16 bits (default 1,000)")
    parser.add_argument("--layer", type=int, default=10_000, help="weights of the runs in 16 bits (default 10,000)")
    parser.add_argument("--lr", type=float, default=1e-3, help="their rate (default 1e-3)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    rows = []
    for exponent in range(9):
        ratio = 10.0**-exponent
        error, bound = direction_error(ratio, args.size), 0.5 * EPS / ratio
        rows.append([f"{ratio:.0e}", f"{error:.1e}", f"{bound:.1e}", f"{error / bound:.2f}"])
    columns = ["|u|/|w| = lr*|g|/|w|", "error (radians)", "eps/2 * |w|/|u|", "error / bound"]
    print_table(f"Direction of the base step as seen by attach, float32, {args.size:,} weights", columns, rows)
    columns = ["step read from", "bytes", "in a step", "error, first", "error, last", "angle to float64", "norm off by"]
    for dtype in HALVES:
        title = f"AdamW on {dtype} parameters, lr={args.lr:g}, {args.layer:,} weights, after {args.steps:,} steps"
        print_table(title, columns, ways(dtype, args.lr, args.layer, args.steps))


if __name__ == "__main__":
    main()
