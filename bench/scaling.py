"""``python -m bench.scaling``: the time of a step against the number of weights, and of tensors.

Two sweeps under momentum: 16 equal matrices of 10^4 to 10^9 weights together, as far as memory goes, which shows where
cost is linear; and 10^7 weights in 1 to 10^5 matrices, which shows what each tensor costs. ``--out`` writes the rows as
``python -m bench.ratios`` does, and ``--figure`` draws them; ``--from`` draws those of an earlier run.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .figures import save_scaling
from .measure import measure
from .providers import Provider, providers, yardstick
from .ratios import new_file, positive, show
from .rows import Row, read, write
from .shapes import Shape

BASE = "momentum"

#: Names of the sweeps, as in the column "model".
BY_WEIGHTS, BY_TENSORS = "16 matrices", "10M weights"


def by_weights(largest: int) -> list[list[Shape]]:
    """16 matrices of 10^4, 10^5, ... weights together, up to ``largest``."""
    return [[(25, 10**power // 400)] * 16 for power in range(4, 10) if 10**power <= largest]


def by_tensors(most: int) -> list[list[Shape]]:
    """10^7 weights in 1, 10, ... matrices, up to ``most``."""
    return [[(10, 10**6 // 10**power)] * 10**power for power in range(6) if 10**power <= most]


def entrants(device: torch.device) -> list[Provider]:
    """The yardstick, the compiled backends that run here, and what costs least by hand."""
    chosen = [yardstick(BASE), "Layca by hand, closed form"]
    chosen += [f"FusedLayca {name}" for name in ("cuda", "triton", "cpu")]
    return [each for each in providers(BASE, device) if each.name in chosen]


def sweep(plan: Mapping[str, Sequence[Sequence[Shape]]], rounds: int, device: torch.device) -> list[Row]:
    """Measure and print each of ``plan``'s models, by the name of their sweep."""
    rows = []
    for name, models in plan.items():
        for shapes in models:
            found = measure(BASE, name, shapes, rounds, device, only=entrants(device))
            show(found)
            rows += found
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=15, help="timed steps of each (default 15)")
    parser.add_argument("--largest", type=positive, default=10**9, help="weights, at most (default 10^9)")
    parser.add_argument("--most", type=positive, default=10**5, help="tensors, at most (default 10^5)")
    parser.add_argument("--out", type=new_file, help="CSV file to write")
    parser.add_argument("--figure", type=new_file, help="PNG or SVG file to draw")
    parser.add_argument("--from", dest="source", type=Path, help="draw the rows of this file; nothing is measured")
    parser.add_argument("--seed", type=int, default=0, help="of weights and gradients (default 0)")
    args = parser.parse_args(argv)
    if args.source is not None:
        rows = read(args.source)
    else:
        torch.manual_seed(args.seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        plan = {BY_WEIGHTS: by_weights(args.largest), BY_TENSORS: by_tensors(args.most)}
        rows = sweep(plan, args.rounds, device)
    if args.out is not None:
        write(args.out, rows)
        print(f"{len(rows)} rows: {args.out}")
    if args.figure is not None:
        sweeps = {name: [row for row in rows if row.model == name] for name in (BY_WEIGHTS, BY_TENSORS)}
        save_scaling(args.figure, sweeps[BY_WEIGHTS], sweeps[BY_TENSORS])
        print(f"Scaling: {args.figure}")


if __name__ == "__main__":
    main()
