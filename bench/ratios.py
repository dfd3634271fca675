"""``python -m bench.ratios``: every provider beside torch's fused SGD, in interleaved rounds.

The machine's speed drifts, so each round times every provider once, one after the other, and the table shows medians
over rounds and ratios of these medians to SGD(fused=True, momentum=0.9).
"""

import argparse
import statistics
import time

import torch
from rich.progress import track

from layca_fast.console import print_table

from .providers import assert_moves, make_params, providers
from .shapes import MODELS

YARDSTICK = "SGD fused"


def measure(model: str, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each provider's step on ``model``, one per round."""
    steps = {}
    for provider in providers(device):
        params = make_params(MODELS[model](), device)
        steps[provider.name] = provider.make(params)
        assert_moves(params, steps[provider.name])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(rounds), f"{model}, {rounds} rounds"):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Print one row per provider."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this one (may be repeated)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = args.model or list(MODELS)
    medians = {
        name: {who: statistics.median(times) for who, times in measure(name, args.rounds, device).items()}
        for name in names
    }
    rows = [
        [who, *(f"{1e3 * medians[m][who]:.1f} ({medians[m][who] / medians[m][YARDSTICK]:.2f})" for m in names)]
        for who in medians[names[0]]
    ]
    print_table(
        f"Median milliseconds per step (ratio to {YARDSTICK}), float32, momentum, {torch.get_num_threads()} threads",
        ["", *names],
        rows,
    )


if __name__ == "__main__":
    main()
