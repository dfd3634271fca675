"""``python -m bench.goals``: the ratios that the CPU backend is held to, each from one interleaved run.

Prints a table, and with ``--out`` writes it to a CSV file, with the bandwidth that each step reached and that of a copy
in the same rounds. The floor is our step where nothing rotates: the same loops, dots included, in one pass over the
same tensors.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from layca_fast.figures.console import print_table

from .providers import FLOOR, OURS, Provider, providers, yardstick
from .ratios import new_file, positive
from .rows import environment, quartiles, round_ratios, write
from .runner import COPY, Contestant, Copy, Model, interleave
from .shapes import MODELS

CPU = torch.device("cpu")

#: At most so many times the step of torch's fused optimizer, by base and model.
FUSED_GOALS = {
    ("momentum", "ResNet-50"): 1.15,
    ("momentum", "GPT-2 small"): 1.35,
    ("momentum", "2000 x 10k"): 0.45,
    ("momentum", "10000 x 100"): 0.1,
    ("adam", "ResNet-50"): 1.1,
    ("adam", "GPT-2 small"): 1.35,
    ("adam", "2000 x 10k"): 0.5,
    ("adam", "10000 x 100"): 0.1,
}

#: The same for the step without Layca.
FLOOR_GOALS = {
    ("momentum", "ResNet-50"): 1.3,
    ("momentum", "GPT-2 small"): 1.5,
    ("momentum", "2000 x 10k"): 1.05,
}

#: Momentum that has decayed to denormal numbers: at most so many times the step on normal ones.
DENORMAL_GOAL = 1.1

#: Two threads: at least so many times as fast as one, where the memory allows it.
THREADS_GOAL = 1.6


@dataclass(frozen=True)
class Result:
    """``value``: the median of the rounds' own ratios that ``what`` describes, ``q1`` and ``q3`` their quartiles.

    ``gb_per_s`` and ``copy_gb_per_s``: bytes moved over the median time, of the step and of the copy.
    """

    what: str
    base: str
    model: str
    goal: str
    value: float
    q1: float
    q3: float
    rounds: int
    gb_per_s: float
    copy_gb_per_s: float
    date: str
    cpu: str
    threads: int
    torch: str


class OnThreads:
    """A step on so many threads."""

    def __init__(self, entry: Contestant | Copy, threads: int) -> None:
        self._entry, self._threads = entry, threads
        self.bytes_per_parameter, self.bytes_moved = entry.bytes_per_parameter, entry.bytes_moved
        self.step, self.check = entry.step, entry.check

    def prepare(self) -> None:
        """The number of threads, outside of the timed step."""
        torch.set_num_threads(self._threads)
        self._entry.prepare()


class Decayed(Contestant):
    """Momentum under zero gradients: every step begins with the same number in all of its buffers."""

    def __init__(self, provider: Provider, model: Model, momentum: float) -> None:
        super().__init__(provider, model)
        self._momentum = momentum
        self._grads = [torch.zeros_like(grad) for grad in model.grads]

    def check(self) -> None:
        """Take one step, which makes the buffers."""
        super().prepare()
        self.step()
        self._buffers = [state["momentum_buffer"] for state in self.step.__self__.state.values()]

    def prepare(self) -> None:
        """Zero gradients, and momentum that has decayed so far."""
        self._give_gradients()
        torch._foreach_zero_(self._buffers)
        torch._foreach_add_(self._buffers, self._momentum)


def result(
    what: str, base: str, model: str, goal: str, entries: dict, seconds: dict, over: str, under: str, copy: str = COPY
) -> Result:
    """The ratio of the steps ``over`` and ``under`` of one interleaved run."""
    q1, value, q3 = round_ratios(seconds[over], seconds[under])
    middle = {name: quartiles(times)[1] for name, times in seconds.items()}
    about = environment(CPU)
    return Result(
        what=what,
        base=base,
        model=model,
        goal=goal,
        value=value,
        q1=q1,
        q3=q3,
        rounds=len(seconds[over]),
        gb_per_s=entries[over].bytes_moved / middle[over] / 1e9,
        copy_gb_per_s=entries[copy].bytes_moved / middle[copy] / 1e9,
        **{name: about[name] for name in ("date", "cpu", "threads", "torch")},
    )


def named(base: str) -> dict[str, Provider]:
    """The providers of a base by name."""
    return {each.name: each for each in providers(base, CPU)}


def against_others(base: str, model: str, rounds: int, limit: float) -> Iterator[Result]:
    """Beside torch's fused optimizer and beside the floor."""
    stage, found = Model(MODELS[model](), CPU), named(base)
    entries: dict = {COPY: Copy(stage)}
    entries |= {name: Contestant(found[name], stage) for name in (yardstick(base), FLOOR, OURS)}
    seconds = interleave(entries, stage, rounds, limit)
    goal = f"<= {FUSED_GOALS[base, model]}"
    yield result(f"over {yardstick(base)}", base, model, goal, entries, seconds, OURS, yardstick(base))
    goal = f"<= {FLOOR_GOALS[base, model]}" if (base, model) in FLOOR_GOALS else ""
    yield result("over the floor", base, model, goal, entries, seconds, OURS, FLOOR)


def on_denormals(model: str, rounds: int, limit: float) -> Iterator[Result]:
    """Momentum of denormal numbers beside momentum of normal ones."""
    stage, ours = Model(MODELS[model](), CPU), named("momentum")[OURS]
    entries: dict = {COPY: Copy(stage), "normal": Decayed(ours, stage, 0.1), "denormal": Decayed(ours, stage, 1e-39)}
    seconds = interleave(entries, stage, rounds, limit)
    what = "denormal over normal momentum"
    yield result(what, "momentum", model, f"<= {DENORMAL_GOAL}", entries, seconds, "denormal", "normal")


def on_two_threads(model: str, rounds: int, limit: float) -> Iterator[Result]:
    """One thread beside two, of ours, and of the copy, which shows what the memory allows."""
    before = torch.get_num_threads()
    stage, ours = Model(MODELS[model](), CPU), named("momentum")[OURS]
    contestant, copy = Contestant(ours, stage), Copy(stage)
    entries: dict = {}
    for threads in (1, 2):
        entries[f"copy on {threads}"] = OnThreads(copy, threads)
        entries[f"step on {threads}"] = OnThreads(contestant, threads)
    try:
        seconds = interleave(entries, stage, rounds, limit)
    finally:
        torch.set_num_threads(before)
    for what, goal in (("step", f">= {THREADS_GOAL}"), ("copy", "")):
        over, under = f"{what} on 1", f"{what} on 2"
        title = f"{what} on 1 thread over 2"
        yield result(title, "momentum", model, goal, entries, seconds, over, under, copy="copy on 1")


def is_met(found: Result) -> str:
    """Whether a goal is reached; "" where none is set."""
    if not found.goal:
        return ""
    sign, limit = found.goal.split()
    return "yes" if (found.value <= float(limit) if sign == "<=" else found.value >= float(limit)) else "no"


def show(results: Sequence[Result]) -> None:
    """Print one line per result."""
    columns = ["", "goal", "measured", "reached", "GB/s", "copy"]
    lines = [
        [
            f"{each.base}, {each.model}\n{each.what}",
            each.goal,
            f"{each.value:.2f} ({each.q1:.2f}-{each.q3:.2f})",
            is_met(each),
            f"{each.gb_per_s:.1f}",
            f"{each.copy_gb_per_s:.1f}",
        ]
        for each in results
    ]
    print_table("Goals of the CPU backend", columns, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.goals", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=21, help="timed steps of each (default 21)")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for one run (default 30)")
    parser.add_argument("--out", type=new_file, help="CSV file to write")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    results: list[Result] = []
    for base, model in FUSED_GOALS:
        results += against_others(base, model, args.rounds, args.limit)
    results += on_denormals("ResNet-50", args.rounds, args.limit)
    results += on_two_threads("GPT-2 small", args.rounds, args.limit)
    show(results)
    if args.out is not None:
        write(args.out, results, Result)


if __name__ == "__main__":
    main()
