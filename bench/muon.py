"""``python -m bench.muon``: Muon's step, turned and plain, beside a loop by hand, torch's and other packages'.

Interleaved rounds on matrices alone. Prints a table of times per model, then one of what our step is held to, and with
``--out`` writes that to a CSV file. On a CPU, peers that multiply in bfloat16 run on small matrices only: without
instructions for that type it takes minutes for a step on large ones. On a GPU all run everywhere, there are no goals,
and what a step is made of is not looked at.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from layca_fast.figures.console import print_table

from .goals import CPU, is_met
from .muon_steps import BY_HAND, OURS, OURS_16, PLAIN, TORCH, OneProduct, Watched, bfloat16, float32
from .plan import sift
from .providers import Provider
from .ratios import new_file, positive
from .rows import environment, quartiles, round_ratios, write
from .runner import Contestant, Model, interleave
from .shapes import Shape, gpt2_small

PRODUCT = "one torch.mm of the same work"


def _gpt2() -> list[Shape]:
    return [shape for shape in gpt2_small()[2:] if len(shape) == 2]


def _squares(side: int, count: int) -> Callable[[], list[Shape]]:
    return lambda: [(side, side)] * count


GPT2, LARGE_SQUARES, SMALL_SQUARES = "GPT-2 small's matrices", "100 squares of 512", "50 squares of 256"

#: Without embeddings; what peers in bfloat16 can be compared on.
MODELS = {GPT2: _gpt2, LARGE_SQUARES: _squares(512, 100), SMALL_SQUARES: _squares(256, 50)}
WITH_PEERS = {SMALL_SQUARES}

#: At most so many times the step of another, by model.
GOALS = {(GPT2, BY_HAND): 0.8, (LARGE_SQUARES, BY_HAND): 0.95, (SMALL_SQUARES, TORCH): 0.6}

#: Where the parts of our own step are held to a goal: matrices so large that Python does not count.
PARTS = (GPT2, LARGE_SQUARES)

#: Operations per second inside of our products, at least, over those of one large product.
PRODUCTS_GOAL = 0.85

#: The part of the step that is no product, at most; and the step over that with rotate=False.
REST_GOAL, ROTATION_GOAL = 0.1, 1.03


@dataclass(frozen=True)
class Result:
    """``value``: the median over rounds of what ``what`` describes, ``q1`` and ``q3`` its quartiles."""

    what: str
    model: str
    goal: str
    value: float
    q1: float
    q3: float
    rounds: int
    date: str
    device: str
    cpu: str
    threads: int
    torch: str


def measure(model: str, rounds: int, limit: float, quick: bool = False, device: torch.device = CPU) -> Iterator[Result]:
    """One interleaved run; prints its times."""
    stage, on_cpu = Model(MODELS[model](), device), device.type == "cpu"
    candidates = [*float32(), *(bfloat16() if model in WITH_PEERS or not on_cpu else ())]
    skipped = sift(candidates, len(stage.weights), quick)
    running = {each.name: each for each in candidates if each.name not in skipped}
    ours = Watched(running.pop(OURS), stage)
    entries: dict = {OURS: ours, **{name: Contestant(each, stage) for name, each in running.items()}}
    ours.check()
    product = OneProduct(ours.work, device)
    seconds = interleave({**entries, PRODUCT: product}, stage, rounds, limit)
    _show(model, stage, seconds, candidates, skipped)
    # The last step of all was a check.
    inside = ours.seconds[-1 - len(seconds[OURS]) : -1]
    about = environment(device)

    def result(what: str, sign: str, goal: float | None, quarters: tuple[float, float, float]) -> Result:
        q1, value, q3 = quarters
        said = f"{sign} {goal}" if goal is not None and on_cpu else ""
        known = {name: about[name] for name in ("date", "device", "cpu", "threads", "torch")}
        return Result(what, model, said, value, q1, q3, len(inside), **known)

    for name in running:
        if name not in (PLAIN, OURS_16):
            ratios = round_ratios(seconds[OURS], seconds[name])
            yield result(f"over {name}", "<=", GOALS.get((model, name)), ratios)
    if TORCH in running:
        yield result(f"ns_dtype=bfloat16 over {TORCH}", "<=", None, round_ratios(seconds[OURS_16], seconds[TORCH]))
    judged = model in PARTS
    if on_cpu:
        share = product.work / ours.work
        speeds = [whole / (part * share) for part, whole in zip(inside, seconds[PRODUCT], strict=True)]
        yield result("speed of products over one torch.mm", ">=", PRODUCTS_GOAL if judged else None, quartiles(speeds))
        rest = [1 - part / whole for part, whole in zip(inside, seconds[OURS], strict=True)]
        yield result("part of the step that is no product", "<=", REST_GOAL if judged else None, quartiles(rest))
    ratios = round_ratios(seconds[OURS], seconds[PLAIN])
    yield result("over our own rotate=False", "<=", ROTATION_GOAL if judged else None, ratios)


def _show(
    model: str, stage: Model, seconds: dict[str, list[float]], candidates: Sequence[Provider], skipped: dict[str, str]
) -> None:
    lines = []
    for name, times in seconds.items():
        q1, middle, q3 = quartiles(times)
        low, ratio, high = round_ratios(times, seconds[BY_HAND])
        cells = [f"{1e3 * middle:.1f}", f"{1e3 * q1:.1f}-{1e3 * q3:.1f}", f"{ratio:.2f} ({low:.2f}-{high:.2f})"]
        lines.append([name, *cells])
    packages = {each.name: each.package_version for each in candidates}
    for name, why in skipped.items():
        lines.append([f"{name} ({packages[name]})" if packages[name] else name, "not run", why, ""])
    where = f"{stage.count / 1e6:.1f} M weights, {stage.device.type}, {torch.get_num_threads()} threads"
    print_table(f"{model}, {where}; ratio to {BY_HAND}", ["", "ms", "quartiles", "ratio"], lines)


def show(results: Sequence[Result]) -> None:
    """Print one line per result."""
    verdicts = {"": "", "yes": "met", "no": "MISSED"}
    lines = [
        [each.model, each.what, each.goal, f"{each.value:.3f} ({each.q1:.3f}-{each.q3:.3f})", verdicts[is_met(each)]]
        for each in results
    ]
    print_table("Muon", ["", "", "goal", "measured", ""], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.muon", description=__doc__)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this one (may be repeated)")
    parser.add_argument("--rounds", type=positive, default=15, help="timed steps of each (default 15)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one model (default 600)")
    parser.add_argument("--quick", action="store_true", help="without what compiles for a minute")
    parser.add_argument("--out", type=new_file, help="CSV file to write")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: list[Result] = []
    for model in args.model or MODELS:
        results += measure(model, args.rounds, args.limit, args.quick, device)
    show(results)
    if args.out is not None:
        write(args.out, results, Result)


if __name__ == "__main__":
    main()
