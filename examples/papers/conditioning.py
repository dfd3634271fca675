"""Batch norm conditions layers better; the last one of a residual network needs it, too (Huang et al., ECCV 2020).

Of each layer the largest eigenvalue of the Fisher block (inputs times gradients) and the condition number of its inputs
over the larger half of the spectrum (kappa of 50 %: dead units make the full one infinite), over 1,000 digits, before
training and after 1, 5 and 20 epochs of SGD. MLPs of 8 hidden layers of 64 units, with and without batch norm; networks
of 10 residual blocks, with and without batch norm before the classifier. lr is a power of 3, chosen on 1,000
validation digits; where the best stands at an end, one more is tried.

    python examples/papers/conditioning.py --seeds 3   # 2 minutes on one core
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from residual_blocks import OWN, build
from small import digits, make_optimizer, mlp, trained
from study import Case, Number, Numbers, Study, Table, best_rate, widened
from torch import nn
from torch.nn import functional

from layca_fast.diagnostics import LayerConditioning
from layca_fast.figures.style import new_figure

EPOCHS, LOOKS = 20, (0, 1, 5, 20)
MLP, MLP_NORM, RESIDUAL, RESIDUAL_NORM = POWERS = {
    "MLP": (-4, -3, -2),
    "MLP, batch norm": (-2, -1, 0),
    "residual": (-4, -3, -2),
    "residual, batch norm last": (-2, -1, 0),
}
COLOURS = dict(zip(POWERS, ("#e69f00", "#0072b2", "#c4402f", "#009e73"), strict=True))


def case(net: str, lr: int) -> Case:
    """One training."""
    return {"net": net, "lr": lr}


def cases(found: Numbers) -> Sequence[Case]:
    """Rates around the best of each."""
    mine = {net: found.of(net=net) if len(found.frame) else found for net in POWERS}
    return [case(net, lr) for net, start in POWERS.items() for lr in widened(mine[net], start)]


def make(net: str) -> nn.Sequential:
    """(N, 1, 14, 14) to logits."""
    if net in (MLP, MLP_NORM):
        return mlp(norm=net == MLP_NORM)
    model = build(OWN)
    if net == RESIDUAL_NORM:
        model.insert(len(model) - 1, nn.BatchNorm1d(64, affine=False))
    return model


def looked_at(model: nn.Module, epoch: int) -> Iterable[Number]:
    """One pass over the training digits; it moves nothing but the batch norms' statistics."""
    part = digits()["train"]
    with LayerConditioning(model) as conditioning:
        functional.cross_entropy(model(part.images), part.labels).backward()
    model.zero_grad()
    (layers,) = conditioning.records.values()
    last = len(layers) - 1
    for place, layer in enumerate(layers.values()):
        # The last one by a number that all networks have.
        at = place if place < last else 99
        yield f"lambda, epoch {epoch}", at, layer.largest or 0.0
        yield f"kappa, epoch {epoch}", at, layer.inputs.condition(0.5)


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """Train with looks in between."""
    model = make(str(case["net"]))
    optimizer = make_optimizer("sgd", model, 3.0 ** int(case["lr"]))
    yield from looked_at(model, 0)
    for quantity, at, value in trained(model, optimizer, 5 if quick else EPOCHS, seed):
        yield quantity, at, value
        if quantity == "training loss" and int(at) in LOOKS:
            yield from looked_at(model, int(at))


def chosen(numbers: Numbers, net: str) -> Numbers:
    """The trainings at the rate that validation chose."""
    mine = numbers.of(net=net)
    return mine.of(lr=best_rate(mine))


def hidden(numbers: Numbers, quantity: str) -> str:
    """Median over the hidden layers, then mean and range over seeds."""
    mine = numbers.of(quantity).by_seed()
    values = [median(column.iloc[1:-1]) for _, column in mine.items()]
    return f"{sum(values) / len(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def last(numbers: Numbers, quantity: str) -> str:
    """Of the classifier."""
    values = numbers.of(quantity, at=99).values()
    return f"{sum(values) / len(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def table(numbers: Numbers) -> Table:
    """Hidden layers after training; the last one before it and after."""
    end = max(int(name.split()[-1]) for name in numbers.frame["quantity"] if name.startswith("kappa"))
    rows = []
    for net in [net for net in POWERS if net in set(numbers.frame["net"])]:
        mine = chosen(numbers, net)
        looks = ((hidden, end), (last, 0), (last, end))
        cells = [show(mine, f"{name}, epoch {epoch}") for show, epoch in looks for name in ("lambda", "kappa")]
        rows.append([net, f"3^{mine.frame['lr'].iloc[0]}", *cells, mine.of("test accuracy").span()])
    columns = [
        f"{place}: {name}"
        for place in ("hidden", "last, before", "last, after")
        for name in ("lambda_max", "kappa of inputs")
    ]
    return ["network", "lr", *columns, "test accuracy"], rows


def draw(path: Path, numbers: Numbers) -> None:
    """By epoch: hidden layers, median; and the classifier."""
    with new_figure((7.2, 2.9), path) as figure:
        panels = figure.subplots(1, 4)
        wanted: Sequence[tuple[str, bool]] = (("lambda", False), ("kappa", False), ("lambda", True), ("kappa", True))
        for axes, (name, of_last) in zip(panels, wanted, strict=True):
            for net, colour in COLOURS.items():
                values = []
                for epoch in LOOKS:
                    frame = chosen(numbers, net).of(f"{name}, epoch {epoch}").by_seed()
                    each = frame.loc[99.0] if of_last else frame.iloc[1:-1].median()
                    values.append((each.mean(), each.min(), each.max()))
                mean, low, high = zip(*values, strict=True)
                axes.plot(range(len(LOOKS)), mean, ".-", color=colour, label=net)
                axes.fill_between(range(len(LOOKS)), low, high, color=colour, alpha=0.15)
            axes.set_yscale("log")
            axes.set_xticks(range(len(LOOKS)), [str(epoch) for epoch in LOOKS])
            axes.set_xlabel("epoch")
            shown = {"lambda": "largest eigenvalue", "kappa": "kappa of inputs"}[name]
            axes.set_title(f"{'last' if of_last else 'hidden'} layer{'' if of_last else 's'}:\n{shown}")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=7)


def check(numbers: Numbers) -> None:
    """Before training, batch norm lowers the condition number of what goes into hidden layers, and into the last."""

    def first(net: str, at_last: bool) -> float:
        frame = chosen(numbers, net).of("kappa, epoch 0").by_seed().mean(axis=1)
        return float(frame.iloc[-1] if at_last else frame.iloc[1:-1].median())

    for plain, normed, at_last in ((MLP, MLP_NORM, False), (RESIDUAL, RESIDUAL_NORM, True)):
        before, after = first(plain, at_last), first(normed, at_last)
        assert after < before, f"{normed}: a condition number of {after}, without of {before}"


STUDY = Study(
    name="conditioning",
    doc=__doc__,
    cases=cases,
    measure=measure,
    quick=[case(net, powers[1]) for net, powers in POWERS.items()],
    table=table,
    draw=draw,
    check=check,
)

if __name__ == "__main__":
    STUDY.main()
