"""What a RotationMonitor has seen, as plain numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What is recorded of each layer, in the order in which files have it.
QUANTITIES = ("rotation", "angle", "norm")


#: Finds what draws curves. ``layca_fast/__init__.py`` hands it in: data do not know who draws them.
_find_drawing: "Callable[[], Callable[..., Figure]] | None" = None


def draw_with(find: "Callable[[], Callable[..., Figure]]") -> None:
    """From now on curves are drawn by what ``find`` returns; it raises ImportError where that is missing."""
    global _find_drawing
    _find_drawing = find


def drawing() -> "Callable[..., Figure]":
    """What draws curves: :func:`layca_fast.figures.rotation.draw`. Raises ImportError where matplotlib is missing."""
    assert _find_drawing is not None, "layca_fast hands it in when it is imported"
    return _find_drawing()


@dataclass(frozen=True)
class Curves:
    """Numbers of some layers over some steps, float64 tensors of shape (steps, layers) on the CPU.

    ``rotation``: 1 - cos of the angle between a layer's weights and its initial ones, from 0 to 2 (arXiv 1806.01603,
    section 3). ``angle``: radians between its weights and those of the record before, NaN in the first; all NaN where
    it was not asked for (``per_step=False``). ``norm``: of its weights. NaN stands for what is not defined: angles of
    weights that are all zero or not finite.
    """

    names: list[str]
    steps: list[int]
    rotation: Tensor
    angle: Tensor
    norm: Tensor

    def of(self, name: str) -> list[float]:
        """The layer rotation curve of one layer; KeyError with the names that there are."""
        if name not in self.names:
            raise KeyError(f"{name!r} is no layer of these curves: there are {self.names}")
        values: list[float] = self.rotation[:, self.names.index(name)].tolist()
        return values

    def after(self, step: int) -> "Curves":
        """The records of later steps than this one."""
        kept = [index for index, each in enumerate(self.steps) if each > step]
        tensors = {name: getattr(self, name)[kept] for name in QUANTITIES}
        return Curves(self.names, [self.steps[index] for index in kept], **tensors)

    def include(self, other: "Curves") -> bool:
        """Whether all of the other's records are among these, with the same numbers."""
        if other.names != self.names or not set(other.steps) <= set(self.steps):
            return False
        rows = [self.steps.index(step) for step in other.steps]
        return all(
            torch.equal(getattr(self, name)[rows].nan_to_num(nan=-1.0), getattr(other, name).nan_to_num(nan=-1.0))
            for name in QUANTITIES
        )

    def records(self) -> Iterator[dict[str, Any]]:
        """One dict per step: ``step``, and for each quantity that is known a dict from layer to number."""
        columns = {name: getattr(self, name).tolist() for name in QUANTITIES if name != "angle" or self.has_angles}
        for index, step in enumerate(self.steps):
            values = {name: dict(zip(self.names, rows[index], strict=True)) for name, rows in columns.items()}
            yield {"step": step, **values}

    @property
    def has_angles(self) -> bool:
        """Whether any angle between records is known."""
        return not bool(self.angle.isnan().all())

    def plot(
        self, path: "str | Path | None" = None, *, quantity: str = "rotation", title: str = "", xlabel: str = "step"
    ) -> "Figure":
        """Draw one quantity of all layers, a line each, and write it to ``path`` if that is given; needs matplotlib.

        ``path``: PNG, PDF or SVG by its suffix. ``quantity``: "rotation", from 0 to 1, to what is reached where that is
        beyond 1 or below 1/2; or "angle", in radians, or "norm", both on a logarithmic scale. ``title`` stands above,
        ``xlabel`` below. Returns the figure, which pyplot knows nothing of. Raises ImportError without matplotlib, and
        ValueError for an unknown quantity, and where there is nothing to draw.
        """
        return drawing()(self, path, quantity=quantity, title=title, xlabel=xlabel)
