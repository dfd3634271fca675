"""What weight decay does under SGD it does through rotation (arXiv 1806.01603).

An MLP of 8 hidden layers of 64 units with batch norm on 1,000 digits, 40 epochs; lr falls to a fifth after epochs 30
and 36. SGD without decay and with it; then FusedLayca, each layer of which turns at every step by the very angle by
which SGD turned it, without decay or with it, as RotationMonitor has measured; then FusedLayca at one rate, and the
same with decay put into the gradient. Rates and decays are powers of 3, chosen on 1,000 validation digits; SGD also
at 3^-1, which is too small for it without decay.

    python examples/papers/weight_decay.py --seeds 3   # 2 minutes on one core
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from small import make_optimizer, mlp, trained
from study import Case, Number, Numbers, Study, Table, best_rate
from torch import Tensor

from layca_fast import RotationMonitor
from layca_fast.figures.style import new_figure

#: SGD's decay, as a power of 3; 0 stands for none.
DECAYS = (-8, -7, -6, -5, -4, -3, -2)
SGD_RATES, LAYCA_RATES, LOW = (-2, -1, 0, 1, 2, 3), (-4, -3, -2, -1), -1
EPOCHS, QUICK_EPOCHS = 40, 15

#: By case: in the table, and in the figure.
SHOWN = {
    "SGD": "0.6",
    "SGD, decay": "black",
    "Layca, SGD's angles": "#56b4e9",
    "Layca, angles of SGD with decay": "#0072b2",
    "Layca": "#c4402f",
    "Layca, decay": "#e69f00",
}


def case(name: str, lr: int, decay: int = 0) -> Case:
    """One training."""
    return {"optimizer": name, "lr": lr, "decay": decay}


def done(found: Numbers, wanted: Sequence[Case]) -> bool:
    """Whether all of these have been trained."""
    return bool(len(found.frame)) and all(len(found.of(**each).frame) for each in wanted)


def best(found: Numbers, wanted: Sequence[Case], factor: str) -> int:
    """The best of these by a factor."""
    rows = Numbers(found.frame[found.frame[factor].isin([each[factor] for each in wanted])])
    return int(best_rate(rows.of(optimizer=wanted[0]["optimizer"]), rate=factor))


def cases(found: Numbers) -> Sequence[Case]:
    """Rates, then decays at the best rate, then what copies angles."""
    rates, layca = [case("SGD", lr) for lr in SGD_RATES], [case("Layca", lr) for lr in LAYCA_RATES]
    wanted = [*rates, *layca]
    if done(found, wanted):
        for lr in (LOW, best(found, rates, "lr")):
            decays = [case("SGD, decay", lr, decay) for decay in DECAYS]
            wanted += decays
            if done(found, decays):
                decay = best(Numbers(found.frame[found.frame["lr"] == lr]), decays, "decay")
                wanted += [case("Layca, SGD's angles", lr), case("Layca, angles of SGD with decay", lr, decay)]
                wanted += [case("Layca, decay", best(found, layca, "lr"), decay)]
    return wanted


def angles_of_sgd(lr: int, decay: int, seed: int, count: int) -> Tensor:
    """By how much each layer turned at each step: (steps, layers), radians."""
    torch.manual_seed(seed)
    model = mlp()
    monitor = RotationMonitor(model, per_step=True)
    for _ in trained(model, sgd(model, lr, decay), count, seed, on_step=monitor.record):
        pass
    return monitor.curves.angle[1:]


def sgd(model: torch.nn.Module, lr: int, decay: int) -> torch.optim.Optimizer:
    """A decay of 0 is none."""
    return make_optimizer("sgd", model, 3.0**lr, weight_decay=3.0**decay if decay else 0.0)


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """Train; note curves, and how far layers turn by the step."""
    name, lr, decay = str(case["optimizer"]), int(case["lr"]), int(case["decay"])
    count = QUICK_EPOCHS if quick else EPOCHS
    copied = angles_of_sgd(lr, decay, seed, count) if "angles" in name else None
    torch.manual_seed(seed)
    model = mlp()
    layca = name.startswith("Layca")
    optimizer = make_optimizer("layca-sgd", model, 3.0**lr) if layca else sgd(model, lr, decay)
    step = 0

    def before(*_: object) -> None:
        nonlocal step
        for layer, group in enumerate(optimizer.param_groups):
            if copied is not None:
                # The rate of Layca is the tangent of the angle.
                group["lr"] = copied[step, layer].tan().item()
            elif layca and decay:
                (param,) = group["params"]
                param.grad.add_(param.detach(), alpha=3.0**decay)
        step += 1

    optimizer.register_step_pre_hook(before)
    monitor = RotationMonitor(model, every=1, per_step=True)
    yield from trained(model, optimizer, count, seed, every=2, on_step=monitor.record)
    for epoch, angle in enumerate(monitor.curves.angle[1:].view(count, -1).mean(dim=1).tolist()):
        yield "angle", epoch + 1, angle


def chosen(numbers: Numbers) -> dict[tuple[str, int], Numbers]:
    """The trainings of each kind and lr at what was chosen; those of SGD and its copies at the small lr, too."""
    kinds = {}
    for name in SHOWN:
        mine = numbers.of(optimizer=name)
        if len(mine.frame):
            at_best = int(best_rate(numbers.of(optimizer="SGD"))) if "SGD" in name else int(best_rate(mine))
            for lr in sorted({LOW, at_best} if "SGD" in name else {at_best}):
                rows = mine.of(lr=lr)
                # A copy is of the decay that was best for SGD, not for the copy.
                judge = numbers.of(optimizer="SGD, decay", lr=lr) if "decay" in name and "SGD" in name else rows
                kinds[name, lr] = rows.of(decay=best_rate(judge, rate="decay"))
    return kinds


def table(numbers: Numbers) -> Table:
    """Rate, decay, and final test accuracy."""
    rows = []
    for (name, lr), mine in sorted(chosen(numbers).items(), key=lambda item: ("SGD" not in item[0][0], item[0][1])):
        decay = f"3^{mine.frame['decay'].iloc[0]}" if mine.frame["decay"].iloc[0] else ""
        rate = f"that of SGD at 3^{lr}" if "angles" in name else f"3^{lr}"
        rows.append([name, rate, decay, f"{mine.of('angle').mean():.4f}", mine.of("test accuracy").span()])
    return ["training", "lr", "SGD's decay", "mean angle of a step", "test accuracy"], rows


def draw(path: Path, numbers: Numbers) -> None:
    """Mean angle of a step, training loss and test accuracy by epoch, of SGD at the small lr."""
    with new_figure((7.2, 2.9), path) as figure:
        panels = figure.subplots(1, 3)
        named = {"angle": "mean angle of a step", "training loss": "", "test accuracy by epoch": "test accuracy"}
        for axes, (quantity, label) in zip(panels, named.items(), strict=True):
            for (name, lr), mine in chosen(numbers).items():
                if "SGD" in name and lr != LOW:
                    continue
                curve = mine.of(quantity).by_seed().mean(axis=1)
                line = "--" if "angles" in name or name == "Layca, decay" else "-"
                axes.plot(curve.index, curve, line, color=SHOWN[name], linewidth=1.2, label=name)
            axes.set_xlabel("epoch")
            axes.set_ylabel(label or quantity)
            if quantity != "test accuracy by epoch":
                axes.set_yscale("log")
        panels[2].set_ylim(0.7, None)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=7)


def check(numbers: Numbers) -> None:
    """Layca with angles of SGD ends where SGD ends; decay changes nothing under Layca."""
    found = {key: mine.of("test accuracy").mean() for key, mine in chosen(numbers).items()}
    copies = {"SGD": "Layca, SGD's angles", "SGD, decay": "Layca, angles of SGD with decay"}
    for (name, lr), accuracy in found.items():
        if name in copies:
            copied = found[copies[name], lr]
            assert abs(accuracy - copied) < 0.02, f"{name} ends at {accuracy}, Layca with its angles at {copied}"
    plain, decayed = ([each for (name, _), each in found.items() if name == kind] for kind in ("Layca", "Layca, decay"))
    assert abs(plain[0] - decayed[0]) < 0.02, f"Layca ends at {plain[0]}, with decay at {decayed[0]}"


STUDY = Study(
    name="weight_decay",
    doc=__doc__,
    cases=cases,
    measure=measure,
    quick=[
        *(case("SGD", -1), case("SGD, decay", -1, -5), case("Layca, SGD's angles", -1), case("Layca", -3)),
        *(case("Layca, angles of SGD with decay", -1, -5), case("Layca, decay", -3, -5)),
    ],
    table=table,
    draw=draw,
    check=check,
)

if __name__ == "__main__":
    STUDY.main()
