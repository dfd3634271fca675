"""``python -m bench.plot FILE.csv`` (or ``python bench/plot.py FILE.csv``): the figure of step times in docs/speed.md.

Draws the time of every provider's step over that of torch's fused optimizer, a panel per model, from a file that
``python -m bench.ratios --out FILE.csv`` wrote.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    # Run as a file: the package is found from the repository's root.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.figures import save_ratios
from bench.ratios import new_file
from bench.rows import read
from bench.shapes import HEADLINE


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one figure."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--base", default="momentum", help="whose steps (default momentum)")
    parser.add_argument("--model", action="append", help=f"a panel (may be repeated; default: {', '.join(HEADLINE)})")
    parser.add_argument("--out", type=new_file, help="PNG or SVG (default: FILE.png)")
    args = parser.parse_args(argv)
    out = args.out or args.file.with_suffix(".png")
    try:
        save_ratios(out, read(args.file), args.base, args.model or HEADLINE)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"Step times: {out}")


if __name__ == "__main__":
    main()
