"""Two norms that He's initialisation keeps, by width (Arpit and Bengio).

A ReLU network of 10 layers at initialisation, weights of variance 2 / outputs: the norm of what goes into each layer
stays near that of the input, |h| = |x|, and the norm of one sample's weight gradient near |x| times that of its error
at the output, the nearer the wider the layers. Beside it Glorot's initialisation. On 16 digits, cross-entropy.
One network strays by its random weights, so there are more seeds than elsewhere.

    python examples/papers/he_norms.py --seeds 10   # a minute on one core
"""

from collections.abc import Iterable
from pathlib import Path

from small import digits
from study import Case, Number, Numbers, Study, Table
from torch import nn
from torch.nn import functional

from layca_fast.diagnostics import norm_propagation
from layca_fast.figures.style import new_figure

LAYERS, WIDTHS = 10, (32, 64, 128, 256, 512)
INITS = {"He": ("#c4402f", "-"), "Glorot": ("0.5", "--")}
QUANTITIES = {"activation": "|h| / |x|", "gradient": "|dL/dW| / (|x| |e|)"}


def case(init: str, width: int) -> Case:
    """One network."""
    return {"init": init, "width": width}


def measure(case: Case, seed: int, quick: bool) -> Iterable[Number]:
    """Both ratios of all layers; and by how much the worst layer misses 1, as a factor."""
    part, width = digits()["train"].first(16), int(case["width"])
    modules: list[nn.Module] = [nn.Flatten()]
    for layer in range(LAYERS):
        linear = nn.Linear(width if layer else 196, width, bias=False)
        if case["init"] == "He":
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.xavier_normal_(linear.weight)
        modules += [linear, nn.ReLU()]
    model = nn.Sequential(*modules[:-1])
    ratios = norm_propagation(model, part.images, lambda out: functional.cross_entropy(out[:, :10], part.labels))
    for quantity in QUANTITIES:
        values = [getattr(each, quantity) for each in ratios.values()]
        for layer, value in enumerate(values):
            yield quantity, layer, value
        yield f"worst {quantity}", 0, max(max(value, 1 / value) for value in values)


def table(numbers: Numbers) -> Table:
    """The factor by which the worst layer misses, by width."""
    widths = sorted(numbers.frame["width"].unique())
    rows = [
        [f"{init}, {shown}", *(numbers.of(f"worst {quantity}", init=init, width=width).span(2) for width in widths)]
        for init in INITS
        for quantity, shown in QUANTITIES.items()
    ]
    return ["worst layer's factor, by width", *(str(width) for width in widths)], rows


def draw(path: Path, numbers: Numbers) -> None:
    """Both ratios by layer, at the smallest and the largest width."""
    with new_figure((7.2, 2.4), path) as figure:
        for axes, (quantity, shown) in zip(figure.subplots(1, 2), QUANTITIES.items(), strict=True):
            for init, (colour, line) in INITS.items():
                for width, weight in ((WIDTHS[0], 0.7), (WIDTHS[-1], 1.8)):
                    mine = numbers.of(quantity, init=init, width=width).by_seed()
                    label = f"{init}, width {width}"
                    axes.plot(mine.index, mine.mean(axis=1), line, color=colour, linewidth=weight, label=label)
                    axes.fill_between(mine.index, mine.min(axis=1), mine.max(axis=1), color=colour, alpha=0.12)
            axes.set_yscale("log")
            axes.set_xlabel("layer")
            axes.set_title(shown)
        figure.axes[0].legend(fontsize=7)


def check(numbers: Numbers) -> None:
    """At the largest width He's norms stay within a half, and Glorot's do not."""
    for quantity in QUANTITIES:
        he, glorot = (numbers.of(f"worst {quantity}", init=init, width=WIDTHS[-1]).mean() for init in INITS)
        assert he < 1.5, f"{quantity} misses 1 by a factor of {he} at width {WIDTHS[-1]}"
        assert glorot > 5, f"{quantity} misses 1 by a factor of {glorot} only under Glorot's initialisation"


STUDY = Study(
    name="he_norms",
    doc=__doc__,
    cases=lambda _: [case(init, width) for init in INITS for width in WIDTHS],
    measure=measure,
    quick=[case(init, width) for init in INITS for width in (WIDTHS[0], WIDTHS[-1])],
    table=table,
    draw=draw,
    check=check,
    seeds=10,
)

if __name__ == "__main__":
    STUDY.main()
