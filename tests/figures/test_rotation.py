"""The figure of rotation curves: a line per layer in the colours of the paper, named or beside a colour bar."""

import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection

from layca_fast import Curves
from layca_fast.figures.rotation import short_names
from layca_fast.monitor.writers import TensorBoardWriter


def curves_of(layers: int, steps: int = 30, highest: float = 0.9) -> Curves:
    rates = torch.linspace(0.1, 1.0, layers, dtype=torch.float64)
    rotation = highest * torch.linspace(0, 1, steps, dtype=torch.float64)[:, None] * rates
    names = [f"model.blocks.{layer // 2}.{('up', 'down')[layer % 2]}.weight" for layer in range(layers)]
    return Curves(names, list(range(steps)), rotation, rotation * 0.01, 1 + rotation)


def test_few_layers_are_named_beside_their_colours(tmp_path: Path) -> None:
    settings = dict(matplotlib.rcParams)
    curves = curves_of(10)
    figure = curves.plot(tmp_path / "few.png", title="Adam")
    assert (tmp_path / "few.png").stat().st_size > 10_000
    assert dict(matplotlib.rcParams) == settings
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        f"blocks.{block}.{kind}" for block in range(5) for kind in ("up", "down")
    ]
    viridis = matplotlib.colormaps["viridis"]
    (lines,) = (each for each in axes.collections if isinstance(each, LineCollection))
    expected = viridis(np.linspace(0, 1, 10))
    assert np.array_equal(lines.get_colors(), expected)
    assert np.array_equal([matplotlib.colors.to_rgba(line.get_color()) for line in legend.get_lines()], expected)
    assert np.array_equal(np.stack(lines.get_segments())[:, :, 1], curves.rotation.T.numpy())
    assert axes.get_ylim() == (0, 1)
    assert axes.get_xlim() == (0, 29)


def test_many_layers_have_a_colour_bar() -> None:
    figure = curves_of(200).plot()
    axes, bar = figure.axes
    assert axes.get_legend() is None
    assert len(axes.collections[0].get_segments()) == 200
    labels = [text.get_text() for text in bar.get_yticklabels()]
    assert labels[0] == "1: blocks.0.up"
    assert labels[-1] == "200: blocks.99.down"
    figure.draw_without_rendering()
    low, high = axes.get_window_extent().x0, axes.get_window_extent().x1
    assert high - low > 0.6 * figure.bbox.width, "names leave the curves their room"


def test_a_short_run_fills_its_axis_which_says_where_it_ends() -> None:
    (axes,) = curves_of(3, highest=0.02).plot().axes
    assert axes.get_ylim() == pytest.approx((0, 1.05 * 0.02))
    assert "ends at 0.021, not at 1" in axes.get_ylabel()
    (axes,) = curves_of(3, highest=0.5).plot().axes
    assert axes.get_ylim() == (0, 1)
    assert "ends" not in axes.get_ylabel()


def test_axes_hold_what_goes_beyond_them_and_what_is_missing() -> None:
    further = curves_of(3, highest=1.7)
    further.rotation[4:, 1] = math.nan
    (axes,) = further.plot().axes
    assert axes.get_ylim()[1] == pytest.approx(1.02 * 1.7)
    only = curves_of(2, steps=1)
    (axes,) = only.plot().axes
    assert len(axes.collections) == 2, "a single record is drawn as dots"
    nothing = Curves(["a"], [0, 1], *(torch.full((2, 1), math.nan, dtype=torch.float64) for _ in range(3)))
    assert nothing.plot().axes[0].get_ylim() == (0, 1)
    (axes,) = curves_of(4).plot(quantity="angle").axes
    assert axes.get_yscale() == "log"


def test_what_cannot_be_drawn_is_an_error() -> None:
    with pytest.raises(ValueError, match="quantity='speed' is unknown"):
        curves_of(2).plot(quantity="speed")
    without = Curves(["a"], [0], torch.zeros(1, 1), torch.full((1, 1), math.nan), torch.ones(1, 1))
    with pytest.raises(ValueError, match="make the monitor with per_step=True"):
        without.plot(quantity="angle")
    with pytest.raises(ValueError, match="no records"):
        without.after(0).plot()
    with pytest.raises(KeyError, match="'b' is no layer"):
        without.of("b")


def test_without_matplotlib_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "layca_fast.figures.rotation")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "layca_fast\[monitor\]"'):
        curves_of(2).plot()
    with pytest.raises(ImportError, match=r'pip install "layca_fast\[monitor\]"'):
        TensorBoardWriter(None)
    TensorBoardWriter(None, figure=False)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["net.a.weight", "net.b.weight"], ["a", "b"]),
        (["net.0.weight", "net.1.weight"], ["net.0", "net.1"]),
        (["a", "b.weight"], ["a", "b.weight"]),
        (["only.one.weight"], ["only.one.weight"]),
        (["x.in[0]", "x.in[1]"], ["in[0]", "in[1]"]),
        (["m." + "n" * 40, "m.short"], ["n" * 14 + "…" + "n" * 14, "short"]),
    ],
)
def test_names_lose_what_they_share(names: list[str], expected: list[str]) -> None:
    assert short_names(names) == expected
