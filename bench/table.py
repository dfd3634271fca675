"""``python -m bench.table FILE.csv``: the table of docs/speed.md, from a file of ``python -m bench.ratios``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .rows import Row, latest, read, shortened
from .shapes import HEADLINE


def is_ours(provider: str) -> bool:
    """Whether a row is this package's, and stands out."""
    return provider.startswith("FusedLayca")


def cell(row: Row | None) -> str:
    """Milliseconds and ratio, or that there are none."""
    if row is None:
        return ""
    if row.median_ms is None or row.ratio_median is None:
        return "not run"
    median, ratio = row.median_ms * shortened(row), row.ratio_median * shortened(row)
    text = f"{median:.3g} ({ratio:.2f})" if median < 1000 else f"{median:.0f} ({ratio:.1f})"
    return f"**{text}**" if is_ours(row.provider) else text


def markdown(rows: Sequence[Row], base: str, models: Sequence[str]) -> str:
    """One line per provider that ran on one of ``models``, one column per model; below, what did not run, and why."""
    columns = [latest(rows, base, model) for model in models]
    names = list(dict.fromkeys(row.provider for column in columns for row in column.values() if not row.skipped))
    lines = ["| | " + " | ".join(models) + " |", "| --- |" + " --- |" * len(models)]
    for name in names:
        label = f"**{name}**" if is_ours(name) else name
        lines.append(f"| {label} | " + " | ".join(cell(column.get(name)) for column in columns) + " |")
    skipped = [(row, model) for column, model in zip(columns, models, strict=True) for row in column.values()]
    reasons: dict[str, list[str]] = {}
    for row, model in skipped:
        if row.skipped:
            reasons.setdefault(f"{row.provider}: {row.skipped}", []).append(model)
    notes = [f"- not run: {why} ({', '.join(where)})" for why, where in reasons.items()]
    return "\n".join([*lines, "", *notes]).rstrip()


def described(rows: Sequence[Row], base: str, models: Sequence[str]) -> str:
    """What the table's numbers are, and where they come from."""
    ran = [row for row in rows if row.base == base and row.model in models and row.rounds]
    if not ran:
        return f"Base {base}: nothing was measured."
    row = ran[0]
    rounds = " to ".join(map(str, sorted({each.rounds for each in ran})))
    where = row.cpu if row.device == "CPU" else row.device
    return (
        f"Base {base}: milliseconds per step (their ratio to {row.yardstick} in the same round), medians of {rounds} "
        f"interleaved rounds, "
        f"{row.dtype}, {where}, {row.threads} threads, torch {row.torch}, {row.date[:10]}:"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each base of the file."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--base", action="append", help="only this one (may be repeated)")
    parser.add_argument("--model", action="append", help=f"a column (may be repeated; default: {', '.join(HEADLINE)})")
    args = parser.parse_args(argv)
    rows = read(args.file)
    models = args.model or [name for name in HEADLINE if any(row.model == name for row in rows)]
    models = models or list(dict.fromkeys(row.model for row in rows))
    for base in args.base or dict.fromkeys(row.base for row in rows):
        print(described(rows, base, models), end="\n\n")
        print(markdown(rows, base, models), end="\n\n")


if __name__ == "__main__":
    main()
