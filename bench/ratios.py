"""``python -m bench.ratios``: every provider beside torch's fused optimizer, in interleaved rounds.

Prints a table per base and model, and with ``--out`` writes a CSV file with one row per measurement (bench/rows.py says
what it holds), which ``python -m bench.table`` and ``python -m bench.plot`` read.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from layca_fast.figures.console import print_table

from .measure import measure
from .providers import BASES, Provider, providers, yardstick
from .rows import Row, write
from .runner import FEWEST_ROUNDS
from .shapes import MODELS, QUICK

DTYPES = {"float32": torch.float32, "float64": torch.float64}

COLUMNS = ["", "ms", "quartiles", "ratio", "bytes per\nparameter", "GB/s", "of copy"]


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def new_file(text: str) -> Path:
    """An argument that must name a file in a folder that exists."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} must be a file in a folder that exists")
    return path


def cells(row: Row) -> list[str]:
    """One line of the printed table."""
    if row.median_ms is None:
        return [row.provider, f"skipped: {row.skipped}"]
    return [
        row.provider,
        f"{row.median_ms:.3f}",
        f"{row.q1_ms:.3f}-{row.q3_ms:.3f}",
        f"{row.ratio_median:.2f} ({row.ratio_q1:.2f}-{row.ratio_q3:.2f})",
        f"{row.bytes_per_parameter:.0f}",
        f"{row.gb_per_s:.1f}",
        f"{row.copy_fraction:.2f}",
    ]


def show(rows: Sequence[Row]) -> None:
    """Print the rows of one base and model, then what was skipped and why."""
    first = rows[0]
    title = (
        f"{first.model}, {first.base}, {first.dtype}: {first.tensors:,} tensors, {first.parameters / 1e6:.1f} M "
        f"weights, {first.device}, {first.threads} threads; ratio to {first.yardstick}"
    )
    measured = [cells(row) for row in rows if not row.skipped]
    if measured:
        print_table(title, COLUMNS, measured)
    else:
        print(title)
    for row in rows:
        if row.skipped:
            print(f"skipped: {row.provider}: {row.skipped}")
    print(flush=True)


def chosen(base: str, device: torch.device, names: Sequence[str] | None) -> list[Provider] | None:
    """The yardstick of ``base`` and its providers of these names; None for all. ValueError for an unknown name."""
    if names is None:
        return None
    known = {each.name for every in BASES for each in providers(every, device)}
    if unknown := set(names) - known:
        raise ValueError(f"--provider {sorted(unknown)[0]!r} is unknown: choose one of {sorted(known)}")
    return [each for each in providers(base, device) if each.name in (*names, yardstick(base))]


def run(
    bases: Iterable[str],
    models: Iterable[str],
    rounds: int,
    device: torch.device,
    names: Sequence[str] | None = None,
    **options: Any,
) -> list[Row]:
    """Measure and print every base on every model; ``options``: those of :func:`bench.measure.measure`."""
    rows = []
    for base in bases:
        options["only"] = chosen(base, device, names)
        for model in models:
            found = measure(base, model, MODELS[model](), rounds, device, **options)
            show(found)
            rows += found
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table per base and model; write the file."""
    parser = argparse.ArgumentParser(prog="python -m bench.ratios", description=__doc__)
    parser.add_argument("--base", action="append", choices=BASES, help="only this one (may be repeated)")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this one (may be repeated)")
    parser.add_argument("--provider", action="append", help="only this one, beside torch's fused (may be repeated)")
    parser.add_argument("--rounds", type=positive, default=31, help="timed steps of each (default 31)")
    limit = f"seconds for the rounds of one table (default 120); {FEWEST_ROUNDS} are made in any case"
    parser.add_argument("--limit", type=float, default=120.0, help=limit)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--out", type=new_file, help="CSV file to write")
    quick = f"only {', '.join(QUICK)}, and without what compiles for minutes"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seed", type=int, default=0, help="of weights and gradients (default 0)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = args.model or (QUICK if args.quick else list(MODELS))
    options = {"dtype": DTYPES[args.dtype], "quick": args.quick, "limit": args.limit}
    try:
        rows = run(args.base or BASES, models, args.rounds, device, args.provider, **options)
    except ValueError as error:
        parser.error(str(error))
    if args.out is not None:
        write(args.out, rows)
        print(f"{len(rows)} rows: {args.out}")


if __name__ == "__main__":
    main()
