"""The plan behind param groups: which tensor rotates, as how many layers, or why it does not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..messages import aligned


@dataclass(frozen=True)
class Row:
    """One trainable tensor in the plan: ``lr_factor`` is None and ``reason`` says why where it does not rotate.

    ``reason`` of one that rotates: how, where that is not as one would think; mostly "".
    ``base`` and ``lr`` are those of its group, None where they are left to the optimizer, ``rule`` is that of what
    rotates, None for the others.
    """

    name: str
    shape: tuple[int, ...]
    layers: int
    lr_factor: float | None
    reason: str
    base: str | None = None
    rule: str | None = None
    lr: float | None = None
    #: The norm from which on it rotates, 0 where that is from the start.
    joins_at: float = 0.0

    def cells(self) -> tuple[str, ...]:
        """What :meth:`LayerGroups.summary` shows of it."""
        if self.lr_factor is None:
            return self.name, str(self.shape), f"no: {self.reason}", "-"
        rotates = f"from norm {self.joins_at:.4g} on" if self.joins_at > 0 else "yes"
        rotates += f", as {self.layers} layers" * (self.layers > 1)
        rotates += f": {self.reason}" * bool(self.reason)
        return self.name, str(self.shape), rotates, f"{self.lr_factor:.4g}"

    def training(self) -> tuple[str, ...]:
        """And what trains it, where that is known."""
        return self.base or "-", self.rule or "-", "optimizer's" if self.lr is None else f"{self.lr:.4g}"


#: Reasons whose tensors a short plan only counts, as they are small and many, and what they are called there.
_COUNTED = {"bias": "biases", "norm layer": "norm layers", "vector": "vectors", "scalar": "scalars"}


def _pattern(names: Sequence[str]) -> str:
    """The name of all these, with * for the numbers in which they differ."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(each[0] if len(set(each)) == 1 else "*" for each in parts)


def _joined(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows that differ in the numbers of their names only as one, at the place of the first, with how many they are.

    Those of biases, norm layers and the like are counted at the end.
    """
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    counted: dict[tuple[str, ...], int] = {}
    for name, shape, rotates, *rest in rows:
        kind = _COUNTED.get(rotates.removeprefix("no: ").removesuffix(", frozen"))
        if kind is not None and rotates.startswith("no: "):
            key = (kind, "-", rotates, *rest)
            counted[key] = counted.get(key, 0) + 1
        else:
            numberless = tuple("*" if part.isdecimal() else part for part in name.split("."))
            alike.setdefault((numberless, (shape, rotates, *rest)), []).append(name)
    joined = [(_pattern(names), str(len(names)), *rest) for (_, rest), names in alike.items()]
    return joined + [(kind, str(count), *rest) for (kind, *rest), count in counted.items()]


class LayerGroups(list[dict[str, Any]]):
    """Param groups for any torch optimizer, and the plan behind them: ``rows``, one per tensor in the model's order.

    ``print(groups)`` shows the plan as it was made, whatever an optimizer did to the groups since. ``left_out`` counts
    the parameters that were not trainable.
    """

    def __init__(self, groups: Iterable[dict[str, Any]] = (), rows: Iterable[Row] = (), left_out: int = 0) -> None:
        super().__init__(groups)
        self.rows = tuple(rows)
        self.left_out = left_out

    def summary(self, short: bool = False) -> str:
        """A table of names, shapes, what rotates or why not, and lr factors; below it, how many of each.

        ``short``: one row, with how many they are, for all tensors whose names differ in numbers only, which stand as
        ``*``, and that are alike in all the rest; and one for all biases, all norm layers, and all other vectors.
        """
        turning = [row for row in self.rows if row.lr_factor is not None]
        total = f"rotating: {len(turning)} ({sum(row.layers for row in turning)} layers)"
        total += f", others: {len(self.rows) - len(turning)}"
        if self.left_out:
            total += f", left out with requires_grad=False: {self.left_out}"
        columns: tuple[str, ...] = ("parameter", "shape", "rotates", "lr factor")
        cells = [row.cells() for row in self.rows]
        if any(row.base is not None for row in self.rows):
            columns += ("base", "rule", "lr")
            cells = [(*row, *of_row.training()) for row, of_row in zip(cells, self.rows, strict=True)]
        if short:
            columns, cells = (columns[0], "tensors", *columns[1:]), _joined(cells)
        return f"{aligned(columns, cells)}\n{total}"

    def __str__(self) -> str:
        return self.summary()
