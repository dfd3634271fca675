"""What transfer.py reports from its CSV: tables on the terminal and in Markdown pages, and two figures."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from transfer_table import Table, Transfer, transfers
from transfer_training import OPTIMIZERS, Setting

from layca_fast.figures.console import print_table
from layca_fast.figures.style import new_figure


@dataclass(frozen=True)
class Study:
    """What differs between the settings: a label and the changes of each. The first one's best rate is transferred.

    ``even``: all settings get all rates from the lowest to the highest that any of them was searched at.
    """

    title: str
    changes: dict[str, dict[str, Any]]
    even: bool = False

    def settings(self, optimizer: str) -> list[Setting]:
        """In the order of ``changes``."""
        return [Setting(optimizer, **change) for change in self.changes.values()]


WIDTHS = (32, 64, 128)

STUDIES = {
    "width": Study("Width, depth 2, 300 steps", {f"width {width}": {"width": width} for width in WIDTHS}, even=True),
    "horizon": Study("Steps, width 32, depth 2", {f"{steps} steps": {"steps": steps} for steps in (300, 1200)}),
    "scale": Study(
        "Scale of the initial hidden matrices, width 32, depth 2, 300 steps",
        {label: {"scale": scale} for label, scale in (("× 1", 1.0), ("× 1/4", 0.25), ("× 4", 4.0))},
    ),
    "depth": Study("Depth, width 32, 300 steps", {f"depth {depth}": {"depth": depth} for depth in (1, 2, 4, 8)}),
    "warm-up": Study(
        "Width, without warm-up, depth 2, 300 steps",
        {f"width {width}": {"width": width, "warm_up": False} for width in WIDTHS},
    ),
}

#: Of widths, from narrow to wide, and of the transferred rate.
COLOURS, TAKEN = matplotlib.colormaps["viridis"](np.linspace(0.75, 0.05, 3)), "#d62728"

#: Losses above it are drawn out of the panel.
HIGHEST = 2.4


def outcomes(table: Table, study: Study, optimizer: str) -> list[Transfer | None]:
    """Of all settings; None where trainings are missing."""
    return transfers(table, study.settings(optimizer))


def cell(outcome: Transfer | None, first: bool) -> str:
    """Best rate and mean loss there; then the mean regret. A question mark: the rate's neighbours are missing."""
    if outcome is None:
        return ""
    rate = f"2^{outcome.best:g}{'' if outcome.inside else '?'}"
    regret = "" if first else f" (+{max(0.0, fmean(outcome.regret)):.3f})"
    return f"{rate}: {fmean(outcome.losses[outcome.best]):.3f}{regret}"


def lines(table: Table, study: Study) -> tuple[list[str], list[list[str]]]:
    """Columns and rows; the last two columns are the regret at the last setting, and the number of seeds."""
    rows = []
    for optimizer, label in OPTIMIZERS.items():
        found = outcomes(table, study, optimizer)
        last = found[-1]
        if found[0] is None:
            continue
        spread = f"{min(last.regret):.3f} to {max(last.regret):.3f}" if last and len(last.regret) > 1 else ""
        cells = [cell(each, first=number == 0) for number, each in enumerate(found)]
        rows.append([label, *cells, spread, str(len(found[0].regret))])
    last_label = list(study.changes)[-1]
    return ["optimizer", *study.changes, f"regret at {last_label}, by seed", "seeds"], rows


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    bars = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in bars)


def fill(page: Path, tables: dict[str, str]) -> None:
    """Write tables between ``<!-- transfer: NAME -->`` and ``<!-- end -->``, where a page has these lines."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        pattern = rf"(<!-- transfer: {re.escape(name)} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, new=table: f"{found[1]}\n{new}\n\n{found[2]}", text, flags=re.S)
    page.write_text(text, encoding="utf-8")


def draw_optimizer(axes: Axes, table: Table, optimizer: str) -> None:
    """Loss against rate, a line for each width; a ring where width 32's best rate lies."""
    found = outcomes(table, STUDIES["width"], optimizer)
    for colour, outcome in zip(COLOURS, found, strict=True):
        if outcome is None:
            continue
        powers, losses = list(outcome.losses), list(outcome.losses.values())
        least, means, most = ([of(each) for each in losses] for of in (min, fmean, max))
        axes.fill_between(powers, least, most, color=colour, alpha=0.2, linewidth=0)
        axes.plot(powers, means, color=colour, marker="o", markersize=2.5, linewidth=1.2)
        axes.plot(outcome.best, min(means), color=colour, marker="o", markersize=6)
        taken = min(fmean(outcome.losses[outcome.taken]), HIGHEST)
        axes.plot(outcome.taken, taken, marker="o", markersize=8, markerfacecolor="none", color=TAKEN)
    last = found[-1]
    regret = f"\nregret {max(0.0, fmean(last.regret)):.3f} nats" if last else ""
    axes.set_title(f"{OPTIMIZERS[optimizer]}{regret}")


def draw_rates(table: Table, path: Path) -> None:
    """Seven panels of held-out loss against rate, and one for the legend."""
    with new_figure((7.2, 4.0), path) as figure:
        panels = figure.subplots(2, 4, sharey=True)
        order = ["adamw", "adamw-hidden", "muon", None, "layca", "hyperball", "muon-layca", "muon-hyperball"]
        for axes, optimizer in zip(panels.flat, order, strict=True):
            if optimizer is None:
                axes.axis("off")
                continue
            draw_optimizer(axes, table, optimizer)
            axes.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(1))
            axes.xaxis.set_major_formatter(lambda power, _: f"$2^{{{power:.0f}}}$")
        panels[0, 0].set_ylim(1.35, HIGHEST)
        for axes in panels[:, 0]:
            axes.set_ylabel("held-out loss, nats per character")
        for axes in panels[1]:
            axes.set_xlabel("learning rate")
        legend = panels[0, 3]
        for width, colour in zip(WIDTHS, COLOURS, strict=True):
            legend.plot(
                [], [], color=colour, marker="o", markersize=6, linewidth=1.2, label=f"width {width}, and its best"
            )
        ring = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "linestyle": "none"}
        legend.plot([], [], color=TAKEN, label="the best rate\nof width 32", **ring)
        legend.legend(loc="center", handlelength=1.5)


def draw_regret(table: Table, path: Path) -> None:
    """A panel for each study: the regret at its last settings, a dot a seed and a bar for the mean."""
    names = [name for name in STUDIES if any(outcomes(table, STUDIES[name], each)[-1] for each in OPTIMIZERS)]
    shown = [(name, place) for name in names for place in ((-2, -1) if name == "scale" else (-1,))]
    with new_figure((7.2, 2.6), path) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(shown), sharex=True, sharey=True))
        for axes, (name, place) in zip(panels, shown, strict=True):
            study = STUDIES[name]
            for height, optimizer in enumerate(reversed(OPTIMIZERS)):
                outcome = outcomes(table, study, optimizer)[place]
                if outcome is None:
                    axes.annotate(
                        "not run", (0, height), xytext=(3, 0), textcoords="offset points", va="center", size=6
                    )
                else:
                    colour = COLOURS[0] if optimizer in ("adamw", "adamw-hidden", "muon") else COLOURS[-1]
                    axes.barh(height, fmean(outcome.regret), color=colour, alpha=0.5, height=0.6)
                    axes.plot(
                        outcome.regret, [height] * len(outcome.regret), "o", color=colour, markersize=2.5, clip_on=False
                    )
            labels = list(study.changes)
            without = "\nno warm-up" if name == "warm-up" else ""
            what = "init. " if name == "scale" else ""
            axes.set_title(f"{what}{labels[0]}\nto {labels[place]}{without}")
        panels[0].set_xlim(left=0)
        panels[0].xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(0.2))
        panels[0].set_yticks(range(len(OPTIMIZERS)), list(reversed(OPTIMIZERS.values())))
        figure.supxlabel("regret of the rate that was best before, nats", fontsize=8)


def best_losses(table: Table) -> str:
    """In Markdown: mean loss and rate of the width study's bests, a row for each width."""
    found = {name: outcomes(table, STUDIES["width"], name) for name in OPTIMIZERS}
    rows = []
    for place, width in enumerate(WIDTHS):
        each = [outcome[place] for outcome in found.values()]
        rows.append(
            [str(width), *(f"{fmean(one.losses[one.best]):.3f}, 2^{one.best:g}" if one else "" for one in each)]
        )
    return markdown(["width", *(f"`{name}`" for name in OPTIMIZERS)], rows)


#: The README's: AdamW, and Layca along both directions beside Muon.
SUMMARISED = ("adamw", "adamw-hidden", "layca", "muon-layca", "muon")


def summary(table: Table) -> str:
    """What the README says of the regrets from the smallest to the largest width; nothing where one is missing."""
    found = {name: outcomes(table, STUDIES["width"], name)[-1] for name in SUMMARISED}
    regrets = {name: each.regret for name, each in found.items() if each is not None}
    if len(regrets) < len(SUMMARISED):
        return ""
    costs = {name: f"{max(0.0, fmean(regret)):.2f}" for name, regret in regrets.items()}
    seeds = sorted({len(regret) for regret in regrets.values()})
    text = (
        f"A learning rate that is tuned on a small model can serve a larger one. Taken from width {WIDTHS[0]} to width "
        f"{WIDTHS[-1]}, the best rate of a character GPT costs AdamW {costs['adamw']} nats per character "
        f"({costs['adamw-hidden']} where only the rate of the hidden matrices is taken along). It costs `FusedLayca` "
        f"{costs['layca']} along Adam's direction and {costs['muon-layca']} along Muon's; Muon's own steps, "
        f"{costs['muon']}. Means of {'/'.join(map(str, seeds))} seeds."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False)


def tables(table: Table) -> dict[str, str]:
    """What pages have a place for, by name: a table for each study that has trainings, the best losses, the summary."""
    found = {name: lines(table, study) for name, study in STUDIES.items()}
    parts = {name: markdown(columns, rows) for name, (columns, rows) in found.items() if rows}
    return {**parts, "best": best_losses(table), "summary": summary(table)}


def report(table: Table, names: Iterable[str], figures: Path, pages: Iterable[Path]) -> None:
    """Print the tables of these studies, write all into pages that have a place for them, draw both figures."""
    for name in names:
        columns, rows = lines(table, STUDIES[name])
        if rows:
            print_table(STUDIES[name].title, columns, rows)
    for page in pages:
        fill(page, tables(table))
    draw_rates(table, figures / "transfer.png")
    draw_regret(table, figures / "transfer_regret.png")
