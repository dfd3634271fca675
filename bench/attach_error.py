"""``python -m bench.attach_error``: how far float32 rounding turns the base step that ``attach`` sees.

``attach`` takes the base step as u = w_before - w_after. Storing w_after in float32 rounds each element by at most
eps/2 of itself, so u is off by an angle of at most eps/2 * |w|/|u|. The step here is that of torch.optim.SGD on
normally distributed weights and gradients; the true one is computed in float64.
"""

import argparse

import torch
from torch.nn import Parameter
from torch.optim import SGD

from layca_fast.commands.verify import angle_between
from layca_fast.figures.console import print_table

EPS = torch.finfo(torch.float32).eps


def direction_error(ratio: float, size: int) -> float:
    """The angle in radians between the step of SGD and what float32 weights show of it, at |u|/|w| = ``ratio``."""
    param = Parameter(torch.randn(size))
    param.grad = torch.randn(size)
    param.grad *= ratio * param.detach().norm() / param.grad.norm()
    before = param.detach().clone()
    SGD([param], lr=1.0).step()
    return angle_between(param.grad.double(), (before - param.detach()).double())


def main() -> None:
    """Print one row per ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1_000_000, help="weights (default 1,000,000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rows = []
    for exponent in range(9):
        ratio = 10.0**-exponent
        error, bound = direction_error(ratio, args.size), 0.5 * EPS / ratio
        rows.append([f"{ratio:.0e}", f"{error:.1e}", f"{bound:.1e}", f"{error / bound:.2f}"])
    columns = ["|u|/|w| = lr*|g|/|w|", "error (radians)", "eps/2 * |w|/|u|", "error / bound"]
    print_table(f"Direction of the base step as seen by attach, float32, {args.size:,} weights", columns, rows)


if __name__ == "__main__":
    main()
