"""Do shallower layers converge faster, and low frequencies before high ones (Which layer is learning faster)?

The rate at which a layer's weights come near those of the end, ln(|w - w*| before / after) per 1,000 steps, from the
start until half of the steps are done; rates lr fall on half a cosine to 0, so that the end is where it comes to rest.
"function": an MLP of 5 layers of 128 units, ReLU, biases random and fixed, fits a sum of sines of 1, 2, 4, 8 and 16
periods at 256 points in 1,000 steps. "digits": 6 residual blocks of width 64 with batch norm on 1,000 digits, 20
epochs. SGD (with momentum 0.9 on the function) and FusedLayca, where all layers turn by the same angle a step.
"one layer": only one layer of the function's MLP is trained, by FusedLayca; what is left of each frequency then.
lr is one of three powers of 3, by the loss at points between those, or on validation digits.

    python examples/papers/layer_convergence.py --seeds 3   # 4 minutes on one core
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
import torch
from residual_blocks import OWN, build
from small import make_optimizer, trained
from study import Case, Number, Numbers, Study, Table, best_rate
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from layca_fast.diagnostics import convergence_rates, snapshot
from layca_fast.figures.style import new_figure

FREQUENCIES = (1, 2, 4, 8, 16)
LAYERS, POINTS, STEPS, EPOCHS = 5, 256, 1000, 20

#: Powers of 3.
POWERS = {
    ("function", "sgd"): (-5, -4, -3),
    ("function", "layca-sgd"): (-5, -4, -3),
    ("digits", "sgd"): (-3, -2, -1),
    ("digits", "layca-sgd"): (-4, -3, -2),
}
NAMES = {"sgd": "SGD", "layca-sgd": "FusedLayca"}
COLOURS = {"sgd": "0.4", "layca-sgd": "#c4402f"}
WHOLE = -1


def case(task: str, name: str, lr: int, layer: int = WHOLE) -> Case:
    """One training; ``layer``: the only one that is trained, if any."""
    return {"task": task, "optimizer": name, "lr": lr, "layer": layer}


def cases(_: Numbers) -> Sequence[Case]:
    """All rates; single layers at one."""
    wanted = [case(task, name, lr) for (task, name), powers in POWERS.items() for lr in powers]
    return wanted + [case("one layer", "layca-sgd", -4, layer) for layer in range(LAYERS)]


def cosine(progress: float) -> float:
    """From 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def target(x: Tensor) -> Tensor:
    """Of (N, 1) in [-1, 1]; every frequency has the same part in it."""
    return torch.stack([torch.sin(math.pi * k * x + k) for k in FREQUENCIES]).sum(0) / len(FREQUENCIES) ** 0.5


def fitter() -> nn.Sequential:
    """(N, 1) to (N, 1)."""
    modules: list[nn.Module] = []
    for layer in range(LAYERS):
        linear = nn.Linear(128 if layer else 1, 128 if layer < LAYERS - 1 else 1)
        linear.bias.requires_grad_(False)
        modules.append(linear)
        if layer < LAYERS - 1:
            nn.init.kaiming_normal_(linear.weight)
            nn.init.uniform_(linear.bias, -1, 1)
            modules.append(nn.ReLU())
    return nn.Sequential(*modules)


def left_over(model: nn.Module, x: Tensor) -> Iterable[Number]:
    """What is not yet fitted of each frequency, as a share of it."""
    wanted = target(x)
    missing = (model(x).detach() - wanted).flatten()
    size, whole = (torch.fft.rfft(each).abs() for each in (missing, wanted.flatten()))
    for k in FREQUENCIES:
        yield "left over", k, (size[k] / whole[k]).item()


def fit(model: nn.Module, optimizer: Optimizer, steps: int) -> Iterable[Number]:
    """Full batches; notes rates, the loss between the points, and when each frequency is half fitted."""
    grid = torch.linspace(-1, 1, 2 * POINTS + 1)[:-1].unsqueeze(1)
    x, between = grid[::2], grid[1::2]
    scheduler = LambdaLR(optimizer, lambda step: cosine(step / steps))
    snapshots, half = {0.0: weights(model)}, dict.fromkeys(FREQUENCIES, math.nan)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (model(x) - target(x)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        if step == steps // 2:
            snapshots[step / 1000] = weights(model)
        if step % 10 == 0:
            for _, k, share in left_over(model, x):
                half[k] = step if math.isnan(half[k]) and share < 0.5 else half[k]
    for layer, rates in enumerate(convergence_rates(snapshots, weights(model)).values()):
        yield "rate", layer, rates[0]
    for k, step in half.items():
        yield "half fitted after", k, step
    yield from left_over(model, x)
    # Under the name of what rates are chosen by.
    yield "validation accuracy", 0, -(model(between) - target(between)).square().mean().item()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Of what is trained."""
    trained_names = {name for name, param in model.named_parameters() if param.requires_grad}
    return {name: each for name, each in snapshot(model).items() if name in trained_names}


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """Train a case."""
    name, lr = str(case["optimizer"]), 3.0 ** int(case["lr"])
    if case["task"] == "digits":
        yield from on_digits(name, lr, seed, EPOCHS)
        return
    model = fitter()
    if case["task"] == "one layer":
        model.requires_grad_(False)[2 * int(case["layer"])].weight.requires_grad_(True)
    options = {"momentum": 0.9} if name == "sgd" else {}
    yield from fit(model, make_optimizer(name, model, lr, **options), STEPS // 2 if quick else STEPS)


def on_digits(name: str, lr: float, seed: int, count: int) -> Iterable[Number]:
    """A rate for the first layer, for each residual block, and for the classifier."""
    model, step = build(OWN), 0
    start, half, steps = snapshot(model), {}, 20 * count

    def note() -> None:
        nonlocal step
        step += 1
        if step == steps // 2:
            half.update(snapshot(model))

    yield from trained(model, make_optimizer(name, model, lr), count, seed, schedule=cosine, on_step=note)
    for layer, rates in enumerate(convergence_rates({0: start, steps / 2000: half}, snapshot(model)).values()):
        yield "rate", layer, rates[0]


def chosen(numbers: Numbers, task: str, name: str) -> Numbers:
    """The trainings at the rate that validation chose."""
    mine = numbers.of(task=task, optimizer=name)
    return mine.of(lr=best_rate(mine)) if len(mine.frame) else mine


def falling(numbers: Numbers) -> float:
    """Rank correlation of a layer's place with its rate: -1 where shallower are faster."""
    mean = numbers.of("rate").by_seed().mean(axis=1)
    return float(mean.rank().corr(mean.index.to_series().rank()))


def until_half(numbers: Numbers, k: int) -> str:
    """After how many steps half of a frequency is fitted; nothing for digits."""
    steps = numbers.of("half fitted after", at=k).values()
    if not steps:
        return ""
    return "never" if any(math.isnan(step) for step in steps) else f"{fmean(steps):.0f}"


def table(numbers: Numbers) -> Table:
    """Rates of first, middle and last layers; and the frequencies."""
    rows = []
    for task, name in POWERS:
        mine = chosen(numbers, task, name)
        if len(mine.frame):
            rates, last = mine.of("rate"), int(mine.of("rate").frame["at"].max())
            cells = [rates.of(at=layer).span(2) for layer in (0, last // 2, last - 1, last)]
            cells += [f"{falling(mine):+.2f}", *(until_half(mine, k) for k in FREQUENCIES)]
            rows.append([f"{task}, {NAMES[name]}", f"3^{mine.frame['lr'].iloc[0]}", *cells])
    columns = ["training", "lr", "first", "middle", "last but one", "last", "rank correlation with depth"]
    return [*columns, *(f"{k} period{'s' if k > 1 else ''}" for k in FREQUENCIES)], rows


def draw(path: Path, numbers: Numbers) -> None:
    """Rates by layer on both tasks; what one trained layer leaves of each frequency."""
    with new_figure((7.2, 2.5), path) as figure:
        *panels, right = figure.subplots(1, 3)
        for axes, task in zip(panels, ("function", "digits"), strict=True):
            for name, colour in COLOURS.items():
                mine = chosen(numbers, task, name).of("rate").by_seed()
                axes.plot(mine.index, mine.mean(axis=1), ".-", color=colour, label=NAMES[name])
                axes.fill_between(mine.index, mine.min(axis=1), mine.max(axis=1), color=colour, alpha=0.15)
            axes.set_title(task)
            axes.set_xlabel("layer")
            axes.set_ylim(0, None)
        panels[0].set_ylabel("rate of convergence per 1,000 steps")
        panels[0].legend(fontsize=7)
        for layer, colour in enumerate(matplotlib.colormaps["viridis"]([i / 4 for i in range(LAYERS)])):
            mine = numbers.of("left over", task="one layer", layer=layer).by_seed()
            right.plot(mine.index, mine.mean(axis=1), ".-", color=colour, label=f"{layer}")
        right.set_xscale("log", base=2)
        right.set_xlabel("periods")
        right.set_title("one layer trained: share not fitted")
        right.legend(title="layer", fontsize=6, title_fontsize=6)


def check(numbers: Numbers) -> None:
    """Under FusedLayca low frequencies are fitted first, and shallower layers of the function's MLP are faster."""
    mine = chosen(numbers, "function", "layca-sgd")
    assert falling(mine) < -0.8, f"the rank correlation of depth and rate is {falling(mine)}"
    low, high = (mine.of("left over", at=k).mean() for k in (FREQUENCIES[0], FREQUENCIES[-1]))
    assert low < high / 2, f"of the lowest frequency {low} is left over, of the highest {high}"


STUDY = Study(
    name="layer_convergence",
    doc=__doc__,
    cases=cases,
    measure=measure,
    quick=[case("function", name, -4) for name in NAMES],
    table=table,
    draw=draw,
    check=check,
)

if __name__ == "__main__":
    STUDY.main()
