"""Write the tables of docs/papers.md from the CSVs of the programs, and leave its words as they are.

python examples/papers/write_page.py
python examples/papers/write_page.py --page docs/demo.md   # that of examples/demo_rates.py
"""

import argparse
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from study import FIGURES, Study

PAGE = FIGURES.with_suffix(".md")

#: In the order of the page.
PROGRAMS = (
    *("one_layer", "layer_rates", "same_budget", "five_bases", "weight_decay", "init_scale"),
    *("layer_convergence", "conditioning", "residual_blocks", "lr_over_batch", "he_norms", "break_even"),
)

BLOCK = re.compile(r"(?<=<!-- table of )(\w+)( -->\n).*?(?=<!-- end -->)", re.S)


def study_of(name: str) -> Study:
    """That of the program of this name."""
    study: Study = import_module(name).STUDY
    return study


def table_of(name: str) -> str:
    """Of a program's CSV, with how many seeds it is over, when it was made and with what."""
    study = study_of(name)
    found = study.read()
    columns, rows = study.table(found)
    lines = [columns, ["---"] * len(columns), *rows]
    days = sorted({date[:10] for date in found.frame["date"]})
    seeds = len(found.frame["seed"].unique())
    made = [f"{package} {', '.join(sorted(found.frame[package].unique()))}" for package in ("layca_fast", "torch")]
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    over = f"Mean (least to most) over {seeds} seeds" if seeds > 1 else "One seed"
    told = f"{over}; {when}, {', '.join(made)}."
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join([told, "", *(f"| {' | '.join(line)} |" for line in cells)])


def render(text: str) -> str:
    """The page with its tables as the CSVs have them."""
    return BLOCK.sub(lambda match: f"{match[1]}{match[2]}{table_of(match[1])}\n", text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/papers.md")
    options = parser.parse_args(arguments)
    options.page.write_text(render(options.page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
