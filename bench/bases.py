"""``python -m bench.bases``: FusedLayca under every base and rule, in interleaved rounds beside torch's fused SGD.

But for bases that direct whole matrices, whose steps are products: ``python -m bench.muon`` has those.
The options are those of ``verify``, so every kernel of every backend that runs natively here is timed.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from layca_fast.commands.cases import BASE_OPTIONS, describe_base
from layca_fast.formulas.options import RULES

from .by_hand import Step
from .measure import measure
from .predict import group_of, moved_bytes
from .providers import LAYCA_ACCURACY, Provider, layca_skipped, providers, turning_all, yardstick
from .ratios import positive, show
from .shapes import MODELS

BACKENDS = ("cuda", "triton", "cpu")


def _step_of(options: dict[str, Any]) -> Callable[[Sequence[Tensor]], Step]:
    return lambda params: turning_all(params, **options).step


def contestants(device: torch.device) -> Iterator[Provider]:
    """The yardstick, then every formula with every rule on every backend that runs at its own speed here."""
    yield next(each for each in providers("momentum", device) if each.name == yardstick("momentum"))
    variants = {describe_base(options)[0]: options for options in BASE_OPTIONS}
    for backend in ("cuda", "triton", "cpu"):
        if layca_skipped(backend, device):
            continue
        for (name, options), rule in product(variants.items(), RULES):
            _, formula = describe_base(options)
            if formula.direct is not None:
                continue
            yield Provider(
                f"{name}, {rule}, {backend}",
                moved_bytes(torch.float32, group_of(options)),
                _step_of({**options, "rule": rule, "backend": backend}),
                4 * len(formula.states),
                # Hyperball turns by an angle that depends on the step.
                accuracy=LAYCA_ACCURACY["adam"] if rule == "layca" else None,
                package="layca_fast",
            )


def main() -> None:
    """Print one table per model."""
    parser = argparse.ArgumentParser(prog="python -m bench.bases", description=__doc__)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="may be repeated (default ResNet-50)")
    parser.add_argument("--rounds", type=positive, default=11, help="timed steps of each (default 11)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in args.model or ["ResNet-50"]:
        everyone = list(contestants(device))
        show(measure("momentum", model, MODELS[model](), args.rounds, device, only=everyone))


if __name__ == "__main__":
    main()
