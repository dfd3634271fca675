"""Where a fixed norm is wrong: AdamW, and FusedLayca with norms that are fixed, learned, or fixed but for the head.

    python examples/fixed_norm.py --seeds 3             # all tasks; goes on where it was interrupted
    python examples/fixed_norm.py --only mlp,batchnorm  # some of them
    python examples/fixed_norm.py --quick               # seconds; fails where the outcome is not what the docs tell

Every training is a row of a CSV, and is skipped where the CSV has it. Learning rates are powers of 3. The one to report
is chosen on validation data: by accuracy, then loss, for digits; by loss for text. As long as the best stands at an end
of those tried, one more is tried. What does not rotate takes the rate that was chosen for AdamW. Rates rise for a
twentieth of the steps, then fall to 0 on half a cosine. On one thread.

Needs the extra "demo" (rich, scikit-learn); one task needs transformers.
"""

import argparse
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import torch
from norm_rows import Row, Table, best_power, versions
from norm_tasks import TASKS, Task
from rich.progress import Progress
from torch import nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from train_lm import schedule

from layca_fast import FusedLayca
from layca_fast.commands.demo.training import one_cpu_thread
from layca_fast.figures.console import print_table
from layca_fast.state.layout import is_vector

ADAMW, FIXED, LEARNED, HEAD_OFF = OPTIMIZERS = ("AdamW", "fixed", "learned", "head off the sphere")

#: What `docs/learned_radius.md` compares with: norms that follow the base step, where the package follows the gradient.
FROM_STEP = "learned from the base step"

#: Beyond these powers of 3 the search does not go.
LARGEST, SMALLEST = 0, -9

RESULTS = Path(__file__).parent / "results" / "fixed_norm.csv"


def make_optimizer(name: str, task: Task, model: nn.Module, lr: float, others_lr: float) -> Optimizer:
    """All matrices rotate, embeddings and heads included, but for those that ``HEAD_OFF`` takes off the sphere."""
    if name == ADAMW:
        return AdamW(model.parameters(), lr)
    off = {id(param) for param in task.head(model)} if name == HEAD_OFF else set()
    turning = [param for param in model.parameters() if not is_vector(param) and id(param) not in off]
    others = [param for param in model.parameters() if is_vector(param) or id(param) in off]
    groups = [{"params": turning, "lr": lr}, {"params": others, "lr": others_lr, "rotate": False}]
    optimizer = FusedLayca(groups, base="adam", radius="learned" if name == LEARNED else "initial")
    if name == FROM_STEP:
        follow_the_step(optimizer)
    return optimizer


def follow_the_step(optimizer: FusedLayca) -> None:
    """As radius="learned", but with the cosine between weights and Adam's step."""
    group = optimizer.param_groups[0]
    (beta, beta_square), eps = group["betas"], group["eps"]
    before: list[torch.Tensor] = []

    def keep(*_: object) -> None:
        before[:] = [param.detach().clone() for param in group["params"]]

    @torch.no_grad()
    def follow(*_: object) -> None:
        for param, old in zip(group["params"], before, strict=True):
            state = optimizer.state[param]
            done = state["step"].item()
            mean, square = state["exp_avg"] / (1 - beta**done), state["exp_avg_sq"] / (1 - beta_square**done)
            step = mean / (square.sqrt() + eps)
            cosine = functional.cosine_similarity(old.flatten().double(), step.flatten().double(), dim=0)
            factor = torch.exp(-min(group["radius_lr"] * group["lr"], 1) * cosine)
            param.mul_(factor)
            state["radius"].mul_(factor)

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(follow)


def norms(model: nn.Module) -> torch.Tensor:
    """Of all matrices."""
    return torch.stack([param.detach().double().norm() for param in model.parameters() if not is_vector(param)])


def train(task: Task, name: str, lr: int, others_lr: int, seed: int) -> Row:
    """One training, from start to end."""
    model = task.model(seed)
    before = norms(model)
    optimizer = make_optimizer(name, task, model, 3.0**lr, 3.0**others_lr)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, task.steps))
    for step in range(task.steps):
        optimizer.zero_grad()
        task.loss(model, seed, step).backward()
        optimizer.step()
        scheduler.step()
    grown = " ".join(f"{factor:.6g}" for factor in (norms(model) / before).tolist())
    scores = {part: task.score(model, seed, part) for part in ("train", "validation", "test")}
    numbers = {
        "validation": scores["validation"].metric,
        "validation_loss": scores["validation"].loss,
        "test": scores["test"].metric,
        "test_loss": scores["test"].loss,
        "train_loss": scores["train"].loss,
    }
    rounded = {key: float(f"{value:.6g}") for key, value in numbers.items()}
    return Row(task.name, name, lr, others_lr, seed, task.steps, **rounded, norms=grown, **versions())


class Contest:
    """Trains what the table lacks."""

    def __init__(self, table: Table, seeds: Sequence[int], progress: Progress) -> None:
        self.table, self.seeds, self.progress = table, seeds, progress

    def need(self, task: Task, name: str, lr: int, others: int, seeds: Iterable[int]) -> None:
        """The rows of these seeds are in the table afterwards."""
        have = {row.key() for row in self.table.rows}
        for seed in seeds:
            if (task.name, name, lr, others, seed, task.steps) not in have:
                self.progress.update(self.bar, description=f"{task.name}: {name}, 3^{lr}, seed {seed}")
                self.table.add(train(task, name, lr, others, seed))
                self.progress.advance(self.bar)

    def search(self, task: Task, name: str, others: int | None) -> int:
        """The best rate, run with every seed. ``others``: that of what does not rotate; None: AdamW, which has one."""
        seeds = self.seeds if task.search_all else self.seeds[:1]
        powers = set(task.powers[0 if name == ADAMW else 1])
        while True:
            for lr in sorted(powers):
                self.need(task, name, lr, lr if others is None else others, seeds)
            found = [row for row in self.table.of(task, name, others, seeds) if row.lr in powers]
            best = best_power(found)
            wider = {power for power in (best - 1, best + 1) if SMALLEST <= power <= LARGEST} - powers
            if not wider:
                break
            powers |= wider
        self.need(task, name, best, best if others is None else others, self.seeds)
        return best

    def run(self, task: Task) -> dict[str, int]:
        """The rates of the optimizers."""
        self.bar = self.progress.add_task(task.name, total=None)
        rates = {ADAMW: self.search(task, ADAMW, None)}
        for name in OPTIMIZERS[1:]:
            rates[name] = self.search(task, name, rates[ADAMW])
        if task.follow_step:
            rates[FROM_STEP] = rates[LEARNED]
            self.need(task, FROM_STEP, rates[LEARNED], rates[ADAMW], self.seeds)
        self.progress.remove_task(self.bar)
        return rates


def span(values: Sequence[float]) -> str:
    """Mean and range."""
    return f"{short(fmean(values))} ({short(min(values))} to {short(max(values))})"


def short(value: float, digits: int = 3) -> str:
    """With so many digits after the point; what has diverged as a power of 10."""
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0e}"


def shown(row: Row, task: Task, part: str) -> float:
    """What tables show of a part of the data."""
    return getattr(row, part if task.metric == "accuracy" else f"{part}_loss")


def outcome(table: Table, task: Task, rates: dict[str, int], seeds: Sequence[int]) -> list[list[str]]:
    """A line for each optimizer at its rate: mean and range over seeds, and how far norms went, least and most."""
    lines = []
    for name, lr in rates.items():
        rows = [row for row in table.of(task, name, others_of(name, rates), seeds) if row.lr == lr]
        growth = [factor for row in rows for factor in row.growth()]
        test = span([shown(row, task, "test") for row in rows])
        loss = span([row.train_loss for row in rows])
        lines.append([name, f"3^{lr}", test, loss, f"{short(min(growth), 2)} to {short(max(growth), 2)}"])
    return lines


def by_rate(table: Table, task: Task, rates: dict[str, int], seeds: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each optimizer: what each rate gave on validation data, mean over the seeds searched."""
    searched = seeds if task.search_all else seeds[:1]
    found = {name: table.of(task, name, others_of(name, rates), searched) for name in rates}
    powers = sorted({row.lr for rows in found.values() for row in rows}, reverse=True)
    lines = []
    for name, rows in found.items():
        values = [[shown(row, task, "validation") for row in rows if row.lr == power] for power in powers]
        lines.append([name, *(f"{fmean(each):.3f}" if each else "" for each in values)])
    return ["optimizer", *(f"3^{power}" for power in powers)], lines


def others_of(name: str, rates: dict[str, int]) -> int | None:
    """The rate of what does not rotate; None for AdamW, which has one rate for all."""
    return None if name == ADAMW else rates[ADAMW]


def report(table: Table, task: Task, rates: dict[str, int], seeds: Sequence[int]) -> None:
    """Print what the chosen rates give, and what each rate gave on validation data."""
    columns = ["optimizer", "lr", f"test {task.metric}", "train loss", "norms / initial norms"]
    title = f"{task.name}, {task.steps} steps, {len(seeds)} seeds: mean (range)"
    print_table(title, columns, outcome(table, task, rates, seeds))
    searched = len(seeds) if task.search_all else 1
    title = f"{task.name}: validation {task.metric} by lr, {searched} seeds"
    print_table(title, *by_rate(table, task, rates, seeds))


def quick() -> None:
    """One training of the MLP each, at fixed rates. Raises SystemExit where the direction is not that of the docs."""
    task, table = TASKS["mlp"], Table(None)
    rates = {ADAMW: -5, FIXED: -3, LEARNED: -3, HEAD_OFF: -3}
    for name, lr in rates.items():
        table.add(train(task, name, lr, rates[ADAMW], seed=0))
    report(table, task, rates, [0])
    rows = {row.optimizer: row for row in table.rows}
    capped = rows[FIXED]
    for name in (ADAMW, LEARNED, HEAD_OFF):
        if not rows[name].train_loss < capped.train_loss / 3 or not rows[name].test > capped.test:
            raise SystemExit(f"{name} is no better than a fixed norm: {rows[name]} against {capped}")
    if any(abs(factor - 1) > 1e-5 for factor in capped.growth()) or max(rows[LEARNED].growth()) < 1.2:
        raise SystemExit("norms that are fixed moved, or norms that are learned did not grow")
    print("learned norms, and a head off the sphere, end below a third of the loss that fixed norms end at")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"any of {','.join(TASKS)}, separated by commas (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV (default: that in examples/results)")
    parser.add_argument("--quick", action="store_true", help="one task at fixed rates, with a check of the direction")
    options = parser.parse_args(arguments)
    ready = [name for name, task in TASKS.items() if not task.needs or find_spec(task.needs)]
    names = ready if options.only is None else options.only.split(",")
    if unknown := [name for name in names if name not in ready]:
        lacks = [f"{name} needs {TASKS[name].needs}" for name in unknown if name in TASKS]
        parser.error(
            f"--only {','.join(unknown)}: choose from {', '.join(ready)}" + "".join(f"; {each}" for each in lacks)
        )
    with one_cpu_thread():
        if options.quick:
            quick()
            return
        table, seeds = Table(options.out), range(options.seeds)
        for name in names:
            with Progress() as progress:
                rates = Contest(table, seeds, progress).run(TASKS[name])
            report(table, TASKS[name], rates, seeds)


if __name__ == "__main__":
    main()
