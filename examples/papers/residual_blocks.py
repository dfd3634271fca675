"""What residual blocks do: they step against the gradient, and shared ones explode (Jastrzębski et al.).

An MLP of 10 residual blocks h + W2 relu(N(W1 relu(N(h)))) of width 64 on 1,000 digits, 20 epochs of FusedLayca, N batch
norm without scale or shift. Kinds: blocks of their own; one block used ten times, with one batch norm or with a batch
norm for each use; one block without batch norm, as it is and with its branch divided by ten. The rate is one of 3^-4,
3^-3, 3^-2, chosen on 1,000 validation digits. Measured over 500 validation digits: cos(F(h), -dL/dh) and |F(h)| / |h|
of each use, and |h| after the last over |h| before the first.

    python examples/papers/residual_blocks.py --seeds 3   # 2 minutes on one core
"""

import math
from collections.abc import Iterable
from pathlib import Path

from small import digits, make_optimizer, trained
from study import Case, Number, Numbers, Study, Table, best_rate
from torch import Tensor, nn
from torch.nn import functional

from layca_fast.diagnostics import IterativeRefinement
from layca_fast.figures.style import new_figure

USES, WIDTH, EPOCHS, POWERS = 10, 64, 20, (-4, -3, -2)
OWN, SHARED, OWN_NORMS, BARE, TAMED = KINDS = (
    "own blocks",
    "shared",
    "shared, own batch norms",
    "shared, no batch norm",
    "shared, no batch norm, F / 10",
)
COLOURS = dict(zip(KINDS, ("black", "#c4402f", "#0072b2", "#e69f00", "#009e73"), strict=True))


class Block(nn.Module):
    """(N, WIDTH) to the same. ``weights``: the two layers; ``scale``: of the branch."""

    def __init__(self, weights: nn.ModuleList, norms: nn.ModuleList, scale: float) -> None:
        super().__init__()
        self.weights, self.norms, self.scale = weights, norms, scale

    def forward(self, h: Tensor) -> Tensor:
        branch = h
        for weight, norm in zip(self.weights, self.norms, strict=True):
            branch = weight(norm(branch).relu())
        return h + self.scale * branch


def two(make: type[nn.Module], *arguments: object, **options: object) -> nn.ModuleList:
    """Of the same kind."""
    return nn.ModuleList(make(*arguments, **options) for _ in range(2))


def build(kind: str) -> nn.Sequential:
    """(N, 1, 14, 14) to logits."""
    blocks, shared, norms = [], two(nn.Linear, WIDTH, WIDTH, bias=False), two(nn.BatchNorm1d, WIDTH, affine=False)
    for _ in range(USES):
        weights = two(nn.Linear, WIDTH, WIDTH, bias=False) if kind == OWN else shared
        own = two(nn.BatchNorm1d, WIDTH, affine=False) if kind in (OWN, OWN_NORMS) else norms
        own = two(nn.Identity) if "no batch norm" in kind else own
        blocks.append(Block(weights, own, 1 / USES if kind == TAMED else 1.0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(196, WIDTH, bias=False), *blocks, nn.Linear(WIDTH, 10, bias=False))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


def case(kind: str, lr: int) -> Case:
    """One training."""
    return {"kind": kind, "lr": lr}


def looked_at(model: nn.Sequential, when: str) -> Iterable[Number]:
    """One pass, which changes nothing but the batch norms' statistics."""
    part = digits()["validation"].first(500)
    names = [str(2 + use) for use in range(USES)]
    sizes: dict[str, Tensor] = {}
    hooks = [
        model[2].register_forward_pre_hook(lambda _, inputs: sizes.update(before=inputs[0].detach().norm(dim=1))),
        model[-1].register_forward_pre_hook(lambda _, inputs: sizes.update(after=inputs[0].detach().norm(dim=1))),
    ]
    with IterativeRefinement(model, names) as refinement:
        functional.cross_entropy(model(part.images), part.labels).backward()
    for hook in hooks:
        hook.remove()
    for use, name in enumerate(names):
        record = refinement.records[0][name]
        yield f"{when} cosine", use, record.cosine
        yield f"{when} ratio", use, record.ratio
    yield f"{when} growth", 0, (sizes["after"] / sizes["before"]).mean().item()


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """Look, train, look."""
    model = build(str(case["kind"]))
    optimizer = make_optimizer("layca-sgd", model, 3.0 ** int(case["lr"]))
    yield from looked_at(model, "initial")
    yield from trained(model, optimizer, 8 if quick else EPOCHS, seed)
    yield from looked_at(model, "final")


def chosen(numbers: Numbers, kind: str) -> tuple[int, Numbers]:
    """The power chosen on validation digits, and the trainings at it."""
    mine = numbers.of(kind=kind)
    lr = int(best_rate(mine))
    return lr, mine.of(lr=lr)


def table(numbers: Numbers) -> Table:
    """Growth, accuracy, cosine and ratio of the first and the last use."""
    rows = []
    for kind in [kind for kind in KINDS if kind in set(numbers.frame["kind"])]:
        lr, mine = chosen(numbers, kind)
        growth = [mine.of(f"{when} growth").mean() for when in ("initial", "final")]
        cells = [f"{value:.3g}" for value in growth]
        cells += [mine.of("train accuracy").span(), mine.of("test accuracy").span()]
        for quantity in ("cosine", "ratio"):
            cells.append(", ".join(f"{mine.of(f'final {quantity}', at=use).mean():.3f}" for use in (0, USES - 1)))
        rows.append([kind, f"3^{lr}", *cells])
    columns = ["|h| grows, initially", "trained", "train accuracy", "test accuracy", "cosine, first and last"]
    return ["blocks", "lr", *columns, "ratio, first and last"], rows


def draw(path: Path, numbers: Numbers) -> None:
    """Cosine and ratio by depth, of a trained network; growth of all kinds."""
    with new_figure((7.2, 2.8), path) as figure:
        left, middle, right = figure.subplots(1, 3)
        for when, colour, label in (("initial", "0.6", "before"), ("final", "#c4402f", "after")):
            for axes, quantity in ((left, "cosine"), (middle, "ratio")):
                mine = chosen(numbers, OWN)[1].of(f"{when} {quantity}").by_seed()
                axes.plot(
                    mine.index,
                    mine.mean(axis=1),
                    ".-",
                    color=colour,
                    label=label,
                )
                axes.fill_between(mine.index, mine.min(axis=1), mine.max(axis=1), color=colour, alpha=0.15)
        left.axhline(0, color="0.8", linewidth=0.6, zorder=0)
        left.set_title("own blocks: cos(F(h), −dL/dh)")
        middle.set_title("own blocks: |F(h)| / |h|")
        left.legend(title="training", fontsize=7, title_fontsize=7)
        for row, kind in enumerate(KINDS):
            mine = chosen(numbers, kind)[1]
            for when, face in (("initial", "white"), ("final", COLOURS[kind])):
                values = mine.of(f"{when} growth").values()
                right.plot(values, [row] * len(values), "o", color=COLOURS[kind], markerfacecolor=face, markersize=4)
        right.set_xscale("log")
        right.set_yticks(range(len(KINDS)), [kind.replace(", ", ",\n") for kind in KINDS], fontsize=6)
        right.invert_yaxis()
        right.set_title("growth of |h|: ○ before, ● after")
        for axes in (left, middle):
            axes.set_xlabel("block")


def check(numbers: Numbers) -> None:
    """Trained blocks step against the gradient, mean over them; one shared block grows h more than own ones do."""
    kinds = set(numbers.frame["kind"])
    before, after = (chosen(numbers, OWN)[1].of(f"{when} cosine").mean() for when in ("initial", "final"))
    assert after > max(0, before), f"the mean cosine with the negative gradient was {before} and is {after}"
    growth = {kind: chosen(numbers, kind)[1].of("initial growth").mean() for kind in kinds}
    assert growth[BARE] > 10 * growth[OWN], f"the shared block does not explode: {growth}"
    assert growth[TAMED] < math.sqrt(USES), f"a tenth of the branch does not tame it: {growth}"


STUDY = Study(
    name="residual_blocks",
    doc=__doc__,
    cases=lambda _: [case(kind, lr) for kind in KINDS for lr in POWERS],
    measure=measure,
    quick=[case(kind, -3) for kind in KINDS],
    table=table,
    draw=draw,
    check=check,
)

if __name__ == "__main__":
    STUDY.main()
