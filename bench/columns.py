"""``python -m bench.columns``: what one layer per column of a matrix costs, beside one layer per row.

Rows lie in memory one after the other, and every backend walks them. The columns of a matrix that is stored row by row
do not: ``backend="auto"`` hands those to the torch backend. Stored column by column they are walked as rows are.
Ratios are medians of the rounds' own ratios, so that what slows a round down slows both of its steps.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.figures.console import print_table

from .runner import seconds_of


def step_of(weight: Tensor, chunks: str, backend: str = "auto") -> Callable[[], object]:
    """The step of one matrix under momentum, once it has taken its first."""
    param = Parameter(weight.clone(memory_format=torch.preserve_format))
    param.grad = torch.randn_like(param)
    optimizer = FusedLayca([param], 0.01, momentum=0.9, chunks=chunks, rotate=True, backend=backend)
    optimizer.step()
    return optimizer.step


def main() -> None:
    """Print a row for each way of storing and cutting the matrix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048, help="rows, and columns (default 2048)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    weight = torch.randn(args.size, args.size, device=device)
    steps = {
        'chunks="all", stored by rows': step_of(weight, "all"),
        'chunks="columns", stored by columns': step_of(weight.t().contiguous().t(), "columns"),
        'chunks="columns", stored by rows': step_of(weight, "columns"),
        'chunks="all", backend="torch"': step_of(weight, "all", "torch"),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds_of(step, device))
    yardstick = next(iter(times.values()))
    rows = []
    for name, seconds in times.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds, yardstick, strict=True)]
        rows.append([name, f"{1e3 * statistics.median(seconds):.2f}", f"{statistics.median(ratios):.2f}"])
    title = f"A step of a {args.size} x {args.size} float32 matrix on {device.type}, {args.rounds} rounds"
    print_table(title, ["layers", "ms", "ratio"], rows)


if __name__ == "__main__":
    main()
