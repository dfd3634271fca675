"""How a tensor is cut into layers: what ``chunks`` comes to for one shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod

from torch import Tensor

from ..formulas.chunks import COLUMNS, MATRICES, Chunks, Split, as_tuples, parts_of
from ..messages import describe

_ORDINALS = ("first", "second", "third", "fourth")

#: The first and the second dimension change places where columns are cut.
_TURN = {0: 1, 1: 0}


@dataclass(frozen=True)
class Cut:
    """The layers of a tensor of ``shape``, in which its first two dimensions have changed places if it is ``turned``.

    Each index of the first ``stack`` dimensions has layers of its own, which the dimension after them is cut into:
    ``bounds`` are where these begin along it, and where the last one ends; () where there is no such dimension. Layers
    count in this order, so that of equal ones each is a row of ``tensor.reshape(layers, -1)``.
    """

    shape: tuple[int, ...]
    turned: bool = False
    stack: int = 0
    bounds: tuple[int, ...] = ()

    @property
    def parts(self) -> int:
        """How many layers each index of the first ``stack`` dimensions has."""
        return max(len(self.bounds) - 1, 1)

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return prod(self.shape[: self.stack]) * self.parts

    @property
    def dims(self) -> int:
        """How many dimensions a layer has; the first of them is what is cut into parts."""
        return len(self.shape) - self.stack

    @property
    def is_even(self) -> bool:
        """Whether all layers have one shape."""
        return len({end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False)}) < 2

    def walked(self, tensor: Tensor) -> Tensor:
        """A tensor, or what this process has of it, as ``shape`` has its dimensions: itself, or a view."""
        return tensor.transpose(0, 1) if self.turned else tensor

    def dim_of(self, dim: int) -> int:
        """Where a dimension of the tensor, or of ``shape``, stands in the other one."""
        return _TURN.get(dim, dim) if self.turned else dim

    def box(self, layer: int) -> tuple[tuple[int, int], ...]:
        """Begin and end of a layer along each dimension of ``shape``."""
        index, part = divmod(layer, self.parts)
        begins = []
        for size in reversed(self.shape[: self.stack]):
            index, at = divmod(index, size)
            begins.append((at, at + 1))
        rows = [(self.bounds[part], self.bounds[part + 1])] if self.bounds else []
        return (*reversed(begins), *rows, *((0, size) for size in self.shape[self.stack + 1 :]))

    def layer_shape(self, layer: int = 0) -> tuple[int, ...]:
        """The shape of a layer: a matrix, whose rows are its first dimension, where that has two or more dimensions."""
        return tuple(end - begin for begin, end in self.box(layer)[self.stack :])

    def within(self, rows: int) -> "Cut":
        """The cut of ``rows`` rows of this tensor, which hold whole layers of one shape."""
        bounds = self.bounds
        if self.stack == 0 and self.parts > 1:
            bounds = tuple(range(0, rows + 1, self.bounds[1])) if rows else (0,)
        return Cut((rows, *self.shape[1:]), self.turned, self.stack, bounds)

    def same_layers(self, other: "Cut") -> bool:
        """Whether both cut a tensor into the same layers, in the same order."""
        return self == other or self.layers == other.layers == 1


def _bounds(size: int, split: Split, which: str, chunks: Chunks, name: str) -> tuple[int, ...]:
    """Where the parts of a dimension of so many begin and end; ValueError where they do not fill it."""
    if isinstance(split, tuple):
        if sum(split) != size:
            raise ValueError(
                f"chunks={chunks!r} adds up to {sum(split)}, and the {which} dimension of {name} is {size}: give sizes "
                f"that add up to {size}, or put the tensor in a group with chunks=1"
            )
        return tuple(accumulate(split, initial=0))
    count = int(split)
    if size % count != 0:
        raise ValueError(
            f"chunks={chunks!r} does not divide the {which} dimension of {name}: choose a divisor of {size}, or put "
            "the tensor in a group with chunks=1"
        )
    return tuple(size // count * part for part in range(count + 1))


@lru_cache(maxsize=1024)
def cut_shape(shape: tuple[int, ...], chunks: Chunks, name: str = "a tensor") -> Cut:
    """How ``chunks``, checked, cuts a tensor of ``shape``; ValueError where it cannot, with ``name`` in the message.

    Of fewer than two dimensions a tensor under "matrices" is one layer, as it is with chunks=1: vectors may be in the
    group of stacked matrices.
    """
    kind, split = parts_of(chunks)
    turned = kind == COLUMNS
    if turned and len(shape) < 2:
        raise ValueError(
            f"chunks={chunks!r} cuts columns, and {name} has none: put it in a group with chunks=1, or rotate=False"
        )
    if kind == MATRICES and len(shape) < 2:
        kind, split = "rows", 1
    walked = (shape[1], shape[0], *shape[2:]) if turned else shape
    stack = max(len(shape) - 2, 0) if kind == MATRICES else 0
    if kind == "rows" and split != 1:
        # A number is one row.
        walked = walked or (1,)
    rows = walked[stack] if len(walked) > stack else 1
    if split == "all" or (stack == 0 and 1 < rows == split):
        # One row each, of which there may be thousands: no part of a dimension, but an index of it.
        split, stack = 1, stack + 1
    if 0 in walked[:stack]:
        # No index has a layer, and a tensor has one at least.
        return Cut(walked, turned, 0, (0, walked[0]))
    dim = 1 if turned else stack
    which = _ORDINALS[dim] if dim < len(_ORDINALS) else f"{dim + 1}th"
    bounds = () if len(walked) == stack else _bounds(walked[stack], split, which, chunks, name)
    return Cut(walked if shape else (), turned, stack if shape else 0, bounds if shape else ())


def cut_of(tensor: Tensor, chunks: Chunks, label: str) -> Cut:
    """How ``chunks`` cuts a tensor that is called ``label``; ValueError, naming it, where it cannot."""
    return cut_shape(tuple(tensor.shape), as_tuples(chunks), describe(label, tensor))


def by_layer(tensor: Tensor, layers: int, dims: int) -> Tensor:
    """A walked tensor, or a piece of one, as (layers, ...), a view; of equal layers of ``dims`` dimensions each."""
    lead = tensor.dim() - dims
    stacked = prod(tensor.shape[:lead])
    if layers == stacked:
        return tensor.view(layers, *tensor.shape[lead:])
    rows = stacked * tensor.shape[lead]
    return tensor.view(layers, rows // layers, *tensor.shape[lead + 1 :])


@dataclass(frozen=True)
class LayerNames:
    """What layers are called, from number ``first`` on; ``given`` are names of the parts, if the group has some.

    There is one name for each layer, or for each part of a matrix of a stack.
    """

    cut: Cut
    given: Sequence[str] | None = None
    first: int = 0

    def suffixes(self, count: int) -> tuple[str, ...]:
        """What follows the name of the tensor in those of the next so many layers."""
        cut, given, numbers = self.cut, self.given, range(self.first, self.first + count)
        if cut.layers == 1:
            return ("",) * count
        if given is None:
            return tuple(f"[{number}]" for number in numbers)
        if len(given) == cut.layers:
            return tuple(f"[{given[number]}]" for number in numbers)
        return tuple(f"[{number // cut.parts}][{given[number % cut.parts]}]" for number in numbers)


def check_names(cut: Cut, names: Sequence[str] | None, name: str) -> None:
    """Raise ValueError where ``names`` are not as many as the layers, or parts of a matrix, of a tensor ``name``."""
    if names is None or cut.layers == 1 or len(names) == cut.layers:
        return
    if cut.stack == 0 or cut.parts == 1 or len(names) != cut.parts:
        raise ValueError(
            f"chunk_names={tuple(names)!r}: are {len(names)} names, and {name} is cut into {cut.layers} layers: give "
            "one for each, or put the tensor in a group with other chunk_names"
        )
