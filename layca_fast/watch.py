"""Whether tensors are still what and where they were, asked of every tensor at every step.

So the loops over tensors are C's: ``map`` over methods and attributes. A Python loop would take longer than the kernels
do on small tensors.
"""

from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any

from torch import Tensor

_DTYPE, _GRAD = attrgetter("dtype"), attrgetter("grad")


def same_objects(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether both hold the very same objects in the same order."""
    return len(left) == len(right) and all(map(is_, left, right))


def gradients(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each parameter."""
    return list(map(_GRAD, params))


def all_there(tensors: Sequence[Any]) -> bool:
    """Whether none of them is None."""
    return all(map(is_not, tensors, repeat(None)))


def addresses(tensors: Sequence[Any]) -> list[int]:
    """Where each tensor begins in memory; 0 for None."""
    if all_there(tensors):
        return list(map(Tensor.data_ptr, tensors))
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


class Layouts:
    """How tensors lie in memory: their addresses, strides, sizes and dtypes.

    Shapes take longest to ask for, and of plain tensors the others decide which addresses a kernel may touch, in which
    order. An address alone says little: memory that was freed is soon given again, to tensors of any kind.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._addresses = addresses(tensors)
        self._strides = list(map(Tensor.stride, tensors))
        self._sizes = list(map(Tensor.numel, tensors))
        self._dtypes = list(map(_DTYPE, tensors))
        self._devices = list(map(Tensor.get_device, tensors))

    def hold(self) -> bool:
        """Whether all still lie as they did."""
        tensors = self._tensors
        return (
            addresses(tensors) == self._addresses
            and list(map(Tensor.stride, tensors)) == self._strides
            and list(map(Tensor.numel, tensors)) == self._sizes
            and list(map(_DTYPE, tensors)) == self._dtypes
        )

    def fit(self, grads: Sequence[Any]) -> bool:
        """Whether these gradients, one (or None) for each tensor, are plain tensors that lie as those, elsewhere."""
        try:
            return (
                set(map(type, grads)) == {Tensor}
                and list(map(Tensor.stride, grads)) == self._strides
                and list(map(Tensor.numel, grads)) == self._sizes
                and list(map(_DTYPE, grads)) == self._dtypes
                and list(map(Tensor.get_device, grads)) == self._devices
                and not any(map(Tensor.is_neg, grads))
            )
        except RuntimeError:
            # Gradients of another layout, such as sparse ones, have no strides.
            return False


class Entries:
    """Which tensors stand under which names in the state of an optimizer."""

    def __init__(self, columns: Mapping[str, Sequence[tuple[Mapping[str, Any], Tensor]]]) -> None:
        """``columns``: for each name, the state of some parameters with the tensor that it holds under the name."""
        self._columns = [
            (itemgetter(name), [state for state, _ in pairs], [tensor for _, tensor in pairs])
            for name, pairs in columns.items()
        ]

    def hold(self) -> bool:
        """Whether they are all still there."""
        try:
            return all(all(map(is_, map(item, states), tensors)) for item, states, tensors in self._columns)
        except KeyError:
            return False
