"""``python -m bench.goals``: the ratios that the CPU backend is held to, each from one interleaved run.

Prints a table, and with ``--out`` writes it to a CSV file, with the bandwidth that each step reached and that of a copy
in the same rounds. Every step is also held against the bare loop (``bare.py``): the same arithmetic on the same memory,
and nothing else.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from layca_fast.figures.console import print_table

from . import bare
from .plan import release_memory
from .providers import BARE, BARE_PLAIN, KERNELS, OURS, PLAIN, PLAIN_KERNELS, Provider, providers, yardstick
from .ratios import new_file, positive
from .rows import environment, quartiles, round_ratios, write
from .runner import COPY, Contestant, Copy, Model, interleave
from .shapes import MODELS

CPU = torch.device("cpu")

#: At most so many times the step of torch's fused optimizer, by base and model.
FUSED_GOALS = {
    ("momentum", "ResNet-50"): 1.1,
    ("momentum", "GPT-2 small"): 1.3,
    ("momentum", "2000 x 10k"): 0.5,
    ("momentum", "10000 x 100"): 0.12,
    ("adam", "ResNet-50"): 1.0,
    ("adam", "GPT-2 small"): 1.3,
    ("adam", "2000 x 10k"): 0.45,
    ("adam", "10000 x 100"): 0.12,
}

#: The kernels alone over the bare loop, rotating and not, on these models; the whole step over it, on that one.
KERNELS_GOAL, KERNELS_MODELS = 1.05, ("ResNet-50", "GPT-2 small", "2000 x 10k")
STEP_GOAL, STEP_MODEL = 1.15, "2000 x 10k"

#: Microseconds for each tensor that a step of :data:`STEP_MODEL` takes beside its kernels, which empty the caches.
HOST_GOAL = 0.5

#: Rotating over rotate=False where no layer fits into a cache: by bytes 40 / 28.
LARGE_GOAL = 1.45

#: The torch backend over the closed form that a user would write with torch's operations.
TORCH_GOAL = 1.2
TORCH, BY_HAND = "FusedLayca torch", "Layca by hand, closed form"

#: Momentum that has decayed to denormal numbers: at most so many times the step on normal ones.
DENORMAL_GOAL = 1.1

#: Two threads: at least so many times as fast as one, where the memory allows it.
THREADS_GOAL = 1.6


@dataclass(frozen=True)
class Result:
    """``value``: the median of the rounds' own numbers that ``what`` describes, ``q1`` and ``q3`` their quartiles.

    They are ratios of two steps where ``what`` names no unit.

    ``ms`` and ``gb_per_s``: the median time of the (first) step, and the bytes that it moves over it; of the copy too.
    """

    what: str
    base: str
    model: str
    goal: str
    value: float
    q1: float
    q3: float
    rounds: int
    ms: float
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


class Run:
    """One interleaved run, and what is made of it."""

    def __init__(self, base: str, model: str, entries: dict, seconds: dict[str, list[float]]) -> None:
        self.base, self.model, self.entries, self.seconds = base, model, entries, seconds

    def ratio(self, what: str, goal: str, over: str, under: str, copy: str = COPY) -> Result:
        """The ratio of the steps ``over`` and ``under``."""
        return self._result(what, goal, round_ratios(self.seconds[over], self.seconds[under]), over, copy)

    def host_part(self, what: str, goal: str, tensors: int, whole: str, kernels: str) -> Result:
        """Microseconds for each tensor by which the step ``whole`` is longer than its ``kernels``."""
        pairs = zip(self.seconds[whole], self.seconds[kernels], strict=True)
        each = [1e6 * (one - other) / tensors for one, other in pairs]
        return self._result(what, goal, quartiles(each), whole, COPY)

    def _result(self, what: str, goal: str, quarters: tuple[float, float, float], of: str, copy: str) -> Result:
        about = environment(CPU)
        return Result(
            what=what,
            base=self.base,
            model=self.model,
            goal=goal,
            value=quarters[1],
            q1=quarters[0],
            q3=quarters[2],
            rounds=len(self.seconds[of]),
            ms=1e3 * statistics.median(self.seconds[of]),
            gb_per_s=self._speed(of),
            copy_gb_per_s=self._speed(copy),
            **{name: about[name] for name in ("date", "cpu", "threads", "torch")},
        )

    def _speed(self, name: str) -> float:
        return self.entries[name].bytes_moved / statistics.median(self.seconds[name]) / 1e9


def named(base: str) -> dict[str, Provider]:
    """The providers of a base by name."""
    return {each.name: each for each in providers(base, CPU)}


def run(base: str, model: str, rounds: int, limit: float, names: Sequence[str]) -> Run:
    """These providers, with a copy, on a model."""
    release_memory(CPU)
    stage, found = Model(MODELS[model](), CPU), named(base)
    entries: dict = {COPY: Copy(stage)}
    entries |= {name: Contestant(found[name], stage) for name in names}
    return Run(base, model, entries, interleave(entries, stage, rounds, limit))


def against_others(base: str, model: str, rounds: int, limit: float) -> Iterator[Result]:
    """Beside torch's fused optimizer and beside the bare loop."""
    unit, loops = yardstick(base), () if bare.missing() else (BARE, BARE_PLAIN)
    made = run(base, model, rounds, limit, (unit, OURS, PLAIN, KERNELS, PLAIN_KERNELS, *loops))
    yield made.ratio(f"over {unit}", f"<= {FUSED_GOALS[base, model]}", OURS, unit)
    yield made.ratio(f"rotate=False over {unit}", "", PLAIN, unit)
    is_aim = model == STEP_MODEL
    tensors, goal = len(MODELS[model]()), f"<= {HOST_GOAL}" if is_aim else ""
    yield made.host_part("host part per tensor, us", goal, tensors, OURS, KERNELS)
    if not loops:
        print(f"no bare loop: {bare.missing()}")
        return
    goal = f"<= {KERNELS_GOAL}" if model in KERNELS_MODELS else ""
    yield made.ratio("kernels over the bare loop", goal, KERNELS, BARE)
    yield made.ratio("kernels over the bare loop, rotate=False", goal, PLAIN_KERNELS, BARE_PLAIN)
    goal = f"<= {STEP_GOAL}" if is_aim else ""
    yield made.ratio("over the bare loop", goal, OURS, BARE)
    yield made.ratio("over the bare loop, rotate=False", goal, PLAIN, BARE_PLAIN)


def on_large_layers(model: str, rounds: int, limit: float) -> Iterator[Result]:
    """What turning adds where every pass goes to memory."""
    made = run("adam", model, rounds, limit, (OURS, PLAIN))
    yield made.ratio("over rotate=False", f"<= {LARGE_GOAL}", OURS, PLAIN)


def of_the_torch_backend(model: str, rounds: int, limit: float) -> Iterator[Result]:
    """Beside what a user would write with torch's operations."""
    made = run("momentum", model, rounds, limit, (TORCH, BY_HAND))
    yield made.ratio("torch backend over the closed form by hand", f"<= {TORCH_GOAL}", TORCH, BY_HAND)


def on_denormals(model: str, rounds: int, limit: float) -> Iterator[Result]:
    """Momentum of denormal numbers beside momentum of normal ones."""
    stage, ours = Model(MODELS[model](), CPU), named("momentum")[OURS]
    entries: dict = {COPY: Copy(stage), "normal": Decayed(ours, stage, 0.1), "denormal": Decayed(ours, stage, 1e-39)}
    made = Run("momentum", model, entries, interleave(entries, stage, rounds, limit))
    yield made.ratio("denormal over normal momentum", f"<= {DENORMAL_GOAL}", "denormal", "normal")


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
        made = Run("momentum", model, entries, interleave(entries, stage, rounds, limit))
    finally:
        torch.set_num_threads(before)
    for what, goal in (("step", f">= {THREADS_GOAL}"), ("copy", "")):
        title = f"{what} on 1 thread over 2"
        yield made.ratio(title, goal, f"{what} on 1", f"{what} on 2", copy="copy on 1")


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
    parser.add_argument("--limit", type=float, default=15.0, help="seconds for one run (default 15)")
    parser.add_argument("--out", type=new_file, help="CSV file to write")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    results: list[Result] = []
    for base, model in FUSED_GOALS:
        results += against_others(base, model, args.rounds, args.limit)
    results += on_large_layers("4 x 31M", args.rounds, args.limit)
    for model in ("ResNet-50", "2000 x 10k"):
        results += of_the_torch_backend(model, args.rounds, args.limit)
    results += on_denormals("ResNet-50", args.rounds, args.limit)
    results += on_two_threads("GPT-2 small", args.rounds, args.limit)
    show(results)
    if args.out is not None:
        write(args.out, results, Result)


if __name__ == "__main__":
    main()
