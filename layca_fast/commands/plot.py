"""``python -m layca_fast plot``: draw the rotation curves that a run has written."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..monitor.curves import QUANTITIES
from ..monitor.reading import read_curves


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; exits with a message where they cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m layca_fast plot", description=__doc__)
    parser.add_argument("file", type=Path, help="what CsvWriter (.csv) or JsonLinesWriter of layca_fast.writers wrote")
    parser.add_argument("--out", type=Path, help="the figure: .png, .pdf or .svg (default: FILE with the suffix .png)")
    parser.add_argument("--quantity", default="rotation", choices=QUANTITIES, help="what to draw (default rotation)")
    parser.add_argument("--title", default="", help="above the figure")
    parser.add_argument("--xlabel", default="step", help="what a step of the file is (default step)")
    args = parser.parse_args(argv)
    args.out = args.out or args.file.with_suffix(".png")
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: must be a file in a folder that exists")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Read one file, draw one figure; returns the exit code."""
    args = parse(argv)
    try:
        curves = read_curves(args.file)
        curves.plot(args.out, quantity=args.quantity, title=args.title, xlabel=args.xlabel)
    except (OSError, ValueError, ImportError) as error:
        # Some of matplotlib's take several lines.
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"{len(curves.names)} layers over {len(curves.steps)} records: {args.out}")
    return 0
