"""One trained layer of eleven: which one is trained decides how well a network generalises (arXiv 1806.01603).

An MLP of eleven layers of 196 units without biases, Glorot's initialisation, ReLU, 100 digits, 10 of each class, full
batch, 300 steps; all layers but one keep their initial weights. Under "frozen", each ReLU lets through what it let
through before the training, so that the output is linear in the trained weights. Test: 1,000 digits.

The initial logits are scaled to a standard deviation of 1, once, because the fixed norm of one layer cannot do it. So
SGD's rate is not the paper's 10: 0.3, of 1 and 0.3 the better one on validation digits. FusedLayca: 3^-3, not searched.

    python examples/papers/one_layer.py --seeds 3   # 2 minutes on one core
"""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from sklearn.metrics import silhouette_score
from small import Part, digits, score_of
from study import Case, Number, Numbers, Study, Table
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR

from layca_fast import FusedLayca
from layca_fast.figures.style import new_figure

LAYERS, WIDTH, STEPS = 11, 196, 300
REGIMES = ("free", "frozen")
DEPTHS = (0, 2, 4, 6, 8, 10)
OPTIMIZERS = {"SGD": (SGD, 0.3), "FusedLayca": (FusedLayca, 3.0**-3)}

#: Steps after which the first layer's feedback is looked at.
LOOKS = (0, 10, 30, 100, 299)


class Deep(nn.Module):
    """(N, 1, 14, 14) to logits (N, 10); ``regimes``, a mask (N, WIDTH) for each ReLU, takes the place of its own."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [196, *[WIDTH] * (LAYERS - 1), 10]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, images: Tensor, regimes: list[Tensor] | None = None) -> Tensor:
        h = images.flatten(1)
        for number, layer in enumerate(self.layers[:-1]):
            h = layer(h)
            h = h.relu() if regimes is None else h * regimes[number]
        return self.layers[-1](h)

    @torch.no_grad()
    def regimes(self, images: Tensor) -> list[Tensor]:
        """Which units of each layer are on, as 0 and 1."""
        masks, h = [], images.flatten(1)
        for layer in self.layers[:-1]:
            h = layer(h).relu()
            masks.append((h > 0).float())
        return masks


def ten_of_each(part: Part) -> Part:
    """100 digits."""
    rows = torch.cat([(part.labels == label).nonzero()[:10, 0] for label in range(10)])
    return Part(part.images[rows], part.labels[rows])


def make(seed: int, images: Tensor) -> Deep:
    """With logits of standard deviation 1 on these images."""
    torch.manual_seed(seed)
    model = Deep()
    with torch.no_grad():
        model.layers[-1].weight.div_(model(images).std())
    return model


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """Train the layer of the case; note its accuracy and, of the first layer, how its feedback clusters by class."""
    train, test = ten_of_each(digits()["train"]), digits()["test"].first(1000)
    model, steps = make(seed, train.images), 150 if quick else STEPS
    depth = int(case["layer"])
    model.requires_grad_(False).layers[depth].requires_grad_(True)
    frozen = case["regime"] == "frozen"
    regimes, test_regimes = (model.regimes(part.images) if frozen else None for part in (train, test))
    kind, lr = OPTIMIZERS[str(case["optimizer"])]
    optimizer = kind([model.layers[depth].weight], lr=lr)
    # The rate falls to a tenth: at a fixed angle per step a network that fits goes on to turn.
    scheduler = LinearLR(optimizer, 1.0, 0.1, steps)
    feedback: list[Tensor] = []
    if depth == 0:
        hook = model.layers[0].register_forward_hook(lambda *call: call[2].register_hook(feedback.append) and None)
    for step in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(train.images, regimes), train.labels).backward()
        if step in LOOKS and feedback:
            # By direction: a digit that is classified has hardly any gradient left.
            yield "silhouette", step, silhouette_score(feedback[-1], train.labels, metric="cosine")
        feedback.clear()
        optimizer.step()
        scheduler.step()
    if depth == 0:
        hook.remove()
    for name, part, masks in (("train", train, regimes), ("test", test, test_regimes)):
        yield f"{name} accuracy", 0, score_of(model(part.images, masks).detach(), part.labels)[0]


def case(optimizer: str, regime: str, layer: int) -> Case:
    """One training."""
    return {"optimizer": optimizer, "regime": regime, "layer": layer}


def table(numbers: Numbers) -> Table:
    """Test accuracy by the layer that was trained."""
    depths = sorted(numbers.frame["layer"].unique())
    rows = []
    for name in OPTIMIZERS:
        for regime in REGIMES:
            mine = numbers.of("test accuracy", optimizer=name, regime=regime)
            if len(mine.frame):
                rows.append([f"{name}, {regime}", *(mine.of(layer=depth).span() for depth in depths)])
    return ["trained layer", *(str(depth) for depth in depths)], rows


def draw(path: Path, numbers: Numbers) -> None:
    """Accuracy by layer; silhouette of the first layer's feedback over training."""
    colours = {"SGD": "0.5", "FusedLayca": "#c4402f"}
    with new_figure((7.2, 2.5), path) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
        for name, colour in colours.items():
            for regime, line in zip(REGIMES, ("-", "--"), strict=True):
                mine = numbers.of("test accuracy", optimizer=name, regime=regime).frame.groupby("layer")["value"]
                left.plot(mine.mean(), line, color=colour, label=f"{name}, {regime}", linewidth=1.2)
                left.fill_between(mine.min().index, mine.min(), mine.max(), color=colour, alpha=0.15, linewidth=0)
                curve = numbers.of("silhouette", optimizer=name, regime=regime, layer=0).by_seed()
                right.plot(curve.index, curve.mean(axis=1), line, color=colour, linewidth=1.2)
        left.set_xlabel("the layer that is trained, of eleven")
        left.set_ylabel("test accuracy")
        left.legend(loc="lower left", fontsize=7)
        right.set_xlabel("step")
        right.set_ylabel("silhouette of the\nfirst layer's feedback")


def check(numbers: Numbers) -> None:
    """Accuracy falls with depth where regimes are free, and rises where they are frozen."""
    mine = numbers.of("test accuracy", optimizer="FusedLayca")
    free, frozen = (mine.of(regime=regime) for regime in REGIMES)
    assert free.of(layer=0).mean() > free.of(layer=10).mean() + 0.05, "free regimes: the first layer is no better"
    assert frozen.of(layer=0).mean() < frozen.of(layer=10).mean() - 0.05, "frozen regimes: the first layer is no worse"


STUDY = Study(
    name="one_layer",
    doc=__doc__,
    cases=lambda _: [case(name, regime, depth) for name in OPTIMIZERS for regime in REGIMES for depth in DEPTHS],
    measure=measure,
    quick=[case("FusedLayca", regime, depth) for regime in REGIMES for depth in (0, 10)],
    table=table,
    draw=draw,
    check=check,
)

if __name__ == "__main__":
    STUDY.main()
