"""What ``make gpu`` measures: FusedLayca beside torch and Layca by hand, its goals, and what they came to.

``python -m bench.gpu_tables --out FILE.json`` measures on the GPU, prints, and writes rows and goals.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layca_fast.figures.console import print_table

from .measure import measure
from .providers import Provider, providers, yardstick
from .ratios import new_file, positive, show
from .rows import Row
from .runner import Timer, device_seconds_of, host_seconds_of
from .shapes import MODELS

LARGE = "1B in 4096 x 4096"

#: Who is compared, beside torch's own optimizers.
NAMES = (
    *("FusedLayca cuda", "FusedLayca triton", "FusedLayca torch"),
    *("Layca by hand, four operations", "Layca by hand, closed form"),
    *("Layca by hand, foreach", "Layca by hand, torch.compile"),
)

#: What is timed: the GPU's part of a step while it has other work, or the host's.
TIMERS: dict[str, Timer] = {"device": device_seconds_of, "host": host_seconds_of}

#: (timer, base, model) of every table.
TABLES = (
    *(("device", "momentum", model) for model in ("ResNet-50", "ViT-B/16", "GPT-2 small", LARGE, "2000 x 10k")),
    *(("device", "adam", model) for model in ("ResNet-50", "ViT-B/16", "GPT-2 small", LARGE)),
    *(("host", "momentum", model) for model in ("ResNet-50", "2000 x 10k")),
)

Found = Mapping[tuple[str, str, str, str], Row]


def entrants(base: str, device: torch.device) -> list[Provider]:
    """The providers that the goals name."""
    wanted = {yardstick(base), *NAMES, yardstick(base).replace("fused", "foreach")}
    return [each for each in providers(base, device) if each.name in wanted]


def tables(
    plan: Iterable[tuple[str, str, str]], device: torch.device, rounds: int, limit: float
) -> Iterator[tuple[str, list[Row]]]:
    """Measure and print each (timer, base, model) of ``plan``; yields the timer's name with the rows."""
    for timer, base, model in plan:
        only = entrants(base, device)
        rows = measure(base, model, MODELS[model](), rounds, device, limit=limit, only=only, timer=TIMERS[timer])
        print(f"Times of the {timer}:")
        show(rows)
        yield timer, rows


@dataclass(frozen=True)
class Goal:
    """A number that ``measure`` makes of the rows, to be at most (or, if ``at_least``, at least) ``goal``."""

    name: str
    goal: float
    moonshot: float | None
    value: Callable[[Found], float]
    at_least: bool = False

    def reaches(self, value: float, wanted: float) -> bool:
        """Whether ``value`` is as good as ``wanted``."""
        return value >= wanted if self.at_least else value <= wanted


def _time(found: Found, timer: str, base: str, model: str, provider: str) -> float:
    median = found[timer, base, model, provider].median_ms
    if median is None:
        raise KeyError(provider)
    return median


def _ratio(found: Found, base: str, model: str, provider: str) -> float:
    ratio = found["device", base, model, provider].ratio_median
    if ratio is None:
        raise KeyError(provider)
    return ratio


def _quotient(base: str, model: str, ours: str, theirs: str) -> Callable[[Found], float]:
    """The rows' ratio to the yardstick (1 of itself), over that of another where rounds compare it to no other."""
    return lambda found: _ratio(found, base, model, ours) / _ratio(found, base, model, theirs)


def _bandwidth(found: Found) -> float:
    share = found["device", "momentum", LARGE, "FusedLayca cuda"].copy_fraction
    if share is None:
        raise KeyError("FusedLayca cuda")
    return share


def _host(model: str) -> Callable[[Found], float]:
    return lambda found: 1e3 * _time(found, "host", "momentum", model, "FusedLayca cuda")


def goals() -> Iterator[Goal]:
    """The project's goals for an H200, float32, momentum 0.9 where nothing else is said."""
    yield Goal(f"cuda, {LARGE}: part of the copy bandwidth at 28 bytes", 0.85, 0.93, _bandwidth, at_least=True)
    limits = {"ResNet-50": (1.1, 1.0), "ViT-B/16": (1.1, 1.0), "GPT-2 small": (1.25, 1.1), LARGE: (1.45, 1.25)}
    for model, (goal, moonshot) in limits.items():
        value = _quotient("momentum", model, "FusedLayca cuda", yardstick("momentum"))
        yield Goal(f"cuda / SGD fused, {model}", goal, moonshot, value)
    for model in limits:
        value = _quotient("adam", model, "FusedLayca cuda", yardstick("adam"))
        yield Goal(f"cuda adam / Adam fused, {model}", 1.45 if model == LARGE else 1.1, 1.0, value)
    for model in limits:
        value = _quotient("momentum", model, "FusedLayca triton", "FusedLayca cuda")
        yield Goal(f"triton / cuda, {model}", 1.15, 1.05, value)
    by_hand = {"four operations": 20.0, "foreach": 4.0, "torch.compile": 1.5}
    for model in limits:
        for name, goal in by_hand.items():
            value = _quotient("momentum", model, f"Layca by hand, {name}", "FusedLayca cuda")
            yield Goal(f"by hand, {name} / cuda, {model}", goal, None, value, at_least=True)
    yield Goal("host, 161 tensors, microseconds", 60.0, 30.0, _host("ResNet-50"))
    yield Goal("host, 2000 tensors, microseconds", 600.0, 250.0, _host("2000 x 10k"))


def outcomes(found: Found) -> list[dict[str, Any]]:
    """Every goal with what was measured (None where a provider did not run) and whether it was reached."""
    rows = []
    for goal in goals():
        try:
            value = goal.value(found)
        except KeyError:
            value = None
        row = {"goal": goal.name, "wanted": goal.goal, "moonshot": goal.moonshot, "measured": value}
        row["reached"] = None if value is None else goal.reaches(value, goal.goal)
        moonshot = goal.moonshot is not None and value is not None
        row["moonshot_reached"] = goal.reaches(value, goal.moonshot) if moonshot else None
        rows.append(row)
    return rows


def show_goals(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what came of the goals."""
    verdicts = {None: "not measured", True: "yes", False: "no"}
    cells = [
        [
            row["goal"],
            f"{row['wanted']:g}",
            "" if row["moonshot"] is None else f"{row['moonshot']:g}",
            "" if row["measured"] is None else f"{row['measured']:.3g}",
            "moonshot" if row["moonshot_reached"] else verdicts[row["reached"]],
        ]
        for row in rows
    ]
    print_table("Goals", ["what", "goal", "moonshot", "measured", "reached"], cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all tables, print them and the goals, write the file after each."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_tables", description=__doc__)
    parser.add_argument("--out", type=new_file, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=positive, default=21, help="timed steps of each (default 21)")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds for the rounds of one table (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and gradients (default 0)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    run(TABLES, torch.device("cuda"), args.rounds, args.limit, args.out)


def run(
    plan: Iterable[tuple[str, str, str]], device: torch.device, rounds: int, limit: float, out: Path
) -> list[dict[str, Any]]:
    """Measure ``plan`` on ``device`` and write ``out``; returns what came of the goals."""
    measured: list[dict[str, Any]] = []
    found: dict[tuple[str, str, str, str], Row] = {}
    for timer, rows in tables(plan, device, rounds, limit):
        measured += [{"timer": timer, **asdict(row)} for row in rows]
        found.update({(timer, row.base, row.model, row.provider): row for row in rows})
        # After each, and at once, so that what is measured stays if a later one fails or time is up.
        unfinished = out.with_name(f"{out.name}.unfinished")
        unfinished.write_text(json.dumps({"goals": outcomes(found), "rows": measured}), encoding="utf-8")
        unfinished.replace(out)
    results = outcomes(found)
    show_goals(results)
    return results


if __name__ == "__main__":
    main()
