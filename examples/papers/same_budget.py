"""The same tuning budget: Layca and SGD, four rates each, on three models (arXiv 1806.01603).

The demo's convolutional network (10 epochs of the demo's 40) and an MLP of 3 hidden layers of 128 units with batch
norm (20 epochs), on 1,000 digits; a GPT over characters (1 block, width 32, 200 steps of 16 rows of 64 characters of
Python's reference), whose LayerNorm vectors keep their initial values. All tensors that are trained rotate under
FusedLayca, base "sgd". The rate is the best of four powers of 3 on validation data; no other is tried, also where the
best stands at an end.

    python examples/papers/same_budget.py --seeds 3   # 4 minutes on one core
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import torch
from small import drops, make_optimizer, mlp, trained
from study import Case, Number, Numbers, Study, Table, best_rate
from torch.optim.lr_scheduler import LambdaLR

from layca_fast.commands.demo.training import Network
from layca_fast.figures.style import new_figure

sys.path.append(str(Path(__file__).parents[1]))
from lm_data import batch, python_reference
from lm_model import CharacterGPT, loss_of

NAMES = {"layca-sgd": "FusedLayca", "sgd": "SGD"}
POWERS = {"layca-sgd": (-4, -3, -2, -1), "sgd": (-2, -1, 0, 1)}
DEMO, MLP, GPT = TASKS = ("demo's network", "MLP", "GPT over characters")


def case(task: str, name: str, lr: int) -> Case:
    """One training."""
    return {"task": task, "optimizer": name, "lr": lr}


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """Train at one rate; the score is accuracy, or minus the loss in nats."""
    name, lr = str(case["optimizer"]), 3.0 ** int(case["lr"])
    if case["task"] == GPT:
        yield from characters(name, lr, seed, 100 if quick else 200)
        return
    model, count = (Network(), 10) if case["task"] == DEMO else (mlp(depth=3, width=128), 20)
    optimizer = make_optimizer(name, model, lr)
    for quantity, at, value in trained(model, optimizer, count // 5 if quick else count, seed):
        yield quantity.replace("accuracy", "score"), at, value


def characters(name: str, lr: float, seed: int, steps: int) -> Iterable[Number]:
    """The GPT: its held-out text is half for validation, half for the test."""
    text = python_reference()
    validation, test = text.held_out.chunk(2)
    model = CharacterGPT(len(text.vocabulary), 64, 32, heads=4, layers=1)
    for param in model.parameters():
        param.requires_grad_(param.dim() > 1)
    optimizer = make_optimizer(name, model, lr)
    scheduler = LambdaLR(optimizer, lambda step: drops(step / steps))
    for step in range(steps):
        inputs, targets = batch(text.train, 16, 64, 10_000 * (seed + 1) + step)
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
        optimizer.step()
        scheduler.step()
    for name, tokens in (("validation score", validation), ("test score", test)):
        yield name, 0, -held_out_loss(model, tokens)


@torch.no_grad()
def held_out_loss(model: CharacterGPT, tokens: torch.Tensor) -> float:
    """Over 256 pieces of a text, nats."""
    batches = (batch(tokens, 64, 64, number) for number in range(4))
    return fmean(loss_of(model(inputs), targets).item() for inputs, targets in batches)


def chosen(numbers: Numbers, task: str, name: str) -> tuple[int, Numbers]:
    """The power chosen on validation data, and the test scores there."""
    mine = numbers.of(task=task, optimizer=name)
    lr = int(best_rate(mine, "validation score"))
    return lr, mine.of("test score", lr=lr)


def shown(task: str, score: Numbers) -> str:
    """Accuracy; or the loss."""
    if task != GPT:
        return score.span()
    return Numbers(score.frame.assign(value=-score.frame["value"])).span() + " nats"


def table(numbers: Numbers) -> Table:
    """A row for each model."""
    rows = []
    for task in TASKS:
        if len(numbers.of(task=task).frame):
            found = [chosen(numbers, task, name) for name in NAMES]
            rows.append([task, *(cell for lr, test in found for cell in (f"3^{lr}", shown(task, test)))])
    return ["model", *(column for name in NAMES.values() for column in ("lr", f"{name}, test"))], rows


def draw(path: Path, numbers: Numbers) -> None:
    """Validation scores by rate, a panel for each model."""
    with new_figure((7.2, 2.3), path) as figure:
        for axes, task in zip(figure.subplots(1, 3), TASKS, strict=True):
            for name, colour in (("layca-sgd", "#c4402f"), ("sgd", "0.5")):
                mine = numbers.of("validation score", task=task, optimizer=name).frame.groupby("lr")["value"]
                rates, sign = [3.0**lr for lr in mine.mean().index], -1 if task == GPT else 1
                axes.plot(rates, sign * mine.mean(), ".-", color=colour, label=NAMES[name])
                axes.fill_between(rates, sign * mine.min(), sign * mine.max(), color=colour, alpha=0.15)
            axes.set_xscale("log")
            axes.set_xlabel("lr")
            axes.set_title(task)
        figure.axes[0].set_ylabel("validation accuracy")
        figure.axes[-1].set_ylabel("validation loss, nats")
        figure.axes[0].legend(fontsize=7)


def check(numbers: Numbers) -> None:
    """On the GPT, FusedLayca's best is better than SGD's by a tenth of a nat."""
    layca, sgd = (chosen(numbers, GPT, name)[1].mean() for name in NAMES)
    assert layca > sgd + 0.1, f"FusedLayca's loss is {-layca}, SGD's {-sgd}"


STUDY = Study(
    name="same_budget",
    doc=__doc__,
    cases=lambda _: [case(task, name, lr) for task in reversed(TASKS) for name in NAMES for lr in POWERS[name]],
    measure=measure,
    quick=[case(GPT, "layca-sgd", -3), case(GPT, "sgd", 0), case(GPT, "sgd", -1)],
    table=table,
    draw=draw,
    check=check,
)

if __name__ == "__main__":
    STUDY.main()
