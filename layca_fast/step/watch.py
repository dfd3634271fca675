"""Whether tensors are still what and where they were, asked of every tensor at every step.

So the loops over tensors are C++'s, where the native module is there and torch tells it in C how a tensor lies in
memory; otherwise they are those of ``map`` over methods and attributes. A Python
loop would take longer than the kernels do on small tensors.
"""

from array import array
from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import attrgetter, getitem, is_, is_not
from typing import Any

from torch import Tensor

from ..compat import EXCHANGE_API
from ..state.native import import_native

_native: Any = import_native("cpu")[0]

_DTYPE, _GRAD, _IS_META = attrgetter("dtype"), attrgetter("grad"), attrgetter("is_meta")


def same_objects(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether both hold the very same objects in the same order."""
    if _native is not None and type(left) is list and type(right) is list:
        same: bool = _native.same_objects(left, right)
        return same
    return len(left) == len(right) and all(map(is_, left, right))


def values_are(entries: Mapping[Any, Any], values: list[Any]) -> bool:
    """Whether the very objects of ``values`` are those of ``entries``, in the same order."""
    if _native is not None and isinstance(entries, dict):
        same: bool = _native.values_are(entries, values)
        return same
    return same_objects(list(entries.values()), values)


def same_items(entries: Mapping[Any, Any], keys: list[Any], values: list[Any]) -> bool:
    """Whether the very objects of ``keys`` and ``values`` are those of ``entries``, in the same order."""
    if _native is not None and isinstance(entries, dict):
        same: bool = _native.same_items(entries, keys, values)
        return same
    return same_objects(list(entries), keys) and same_objects(list(entries.values()), values)


def gradients(params: list[Tensor]) -> list[Tensor | None]:
    """The gradient of each parameter."""
    found: list[Tensor | None] = list(map(_GRAD, params)) if _native is None else _native.attributes(params, "grad")
    return found


def all_there(tensors: Sequence[Any]) -> bool:
    """Whether none of them is None."""
    return all(map(is_not, tensors, repeat(None)))


def column(numbers: Sequence[int]) -> bytes:
    """The numbers as a column of a table, int64."""
    return array("q", numbers).tobytes()


def addresses(tensors: Sequence[Any]) -> bytes:
    """Where each tensor begins in memory, 0 for None, as a column of a table."""
    if all_there(tensors):
        return column(list(map(Tensor.data_ptr, tensors)))
    return column([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def _native_layouts(tensors: list[Tensor], owned: bool) -> Any:
    if _native is None or EXCHANGE_API is None:
        return None
    try:
        return _native.Layouts(EXCHANGE_API, tensors, owned)
    except (TypeError, ValueError, BufferError, RuntimeError):
        # An exchange API of another version, or tensors that it does not describe.
        return None


class Layouts:
    """How tensors lie in memory: their addresses, strides, sizes, dtypes and devices.

    An address alone says little: memory that was freed is soon given again, to tensors of any kind.
    """

    def __init__(self, tensors: list[Tensor], owned: bool = False) -> None:
        """``owned``: they are the optimizer's own, and nobody exchanges them by torch.utils.swap_tensors."""
        self._tensors = tensors
        self._native = _native_layouts(tensors, owned)
        if self._native is None:
            # Shapes take longest to ask for, and of plain tensors the others decide which addresses a kernel may
            # touch, in which order.
            self._addresses = addresses(tensors)
            self._strides = list(map(Tensor.stride, tensors))
            self._sizes = list(map(Tensor.numel, tensors))
            self._dtypes = list(map(_DTYPE, tensors))
            self._devices = list(map(Tensor.get_device, tensors))

    def hold(self) -> bool:
        """Whether all still lie as they did."""
        tensors = self._tensors
        if self._native is not None:
            holds: bool = self._native.hold(tensors)
            return holds
        return (
            addresses(tensors) == self._addresses
            and list(map(Tensor.stride, tensors)) == self._strides
            and list(map(Tensor.numel, tensors)) == self._sizes
            and list(map(_DTYPE, tensors)) == self._dtypes
        )

    def look(self) -> tuple[list[Any], bytes | None] | None:
        """The gradients of the tensors, with what :meth:`fit` says of them, if :meth:`hold`; otherwise None."""
        if self._native is not None:
            try:
                found: tuple[list[Any], bytes | None] | None
                found = self._native.look(self._tensors, "grad", Tensor, Tensor.is_neg)
            except RuntimeError:
                # Of which of the two, is told by asking one after the other.
                pass
            else:
                return found
        if not self.hold():
            return None
        grads = gradients(self._tensors)
        return grads, self.fit(grads)

    def fetch(self, first: int, last: int) -> None:
        """Where that can be done: have what torch keeps of tensors [first, last) fetched from memory."""
        if self._native is not None:
            self._native.fetch(self._tensors, first, last)

    def fit(self, grads: list[Any]) -> bytes | None:
        """The addresses of these gradients if each is a plain tensor that lies as its tensor does; otherwise None.

        ``grads`` has one, or None, for each tensor.
        """
        if self._native is not None:
            try:
                found: bytes | None = self._native.fit(grads, Tensor, Tensor.is_neg)
            except RuntimeError:
                return None
            return found
        try:
            fits = (
                set(map(type, grads)) == {Tensor}
                and list(map(Tensor.stride, grads)) == self._strides
                and list(map(Tensor.numel, grads)) == self._sizes
                and list(map(_DTYPE, grads)) == self._dtypes
                and list(map(Tensor.get_device, grads)) == self._devices
                and not any(map(Tensor.is_neg, grads))
                and not any(map(_IS_META, grads))
            )
        except RuntimeError:
            # Gradients of another layout, such as sparse ones, have no strides.
            return None
        where = list(map(Tensor.data_ptr, grads)) if fits else [0]
        # Without memory: it was freed, or there are no elements.
        return None if 0 in where else column(where)


class Entries:
    """Which tensors stand under which names in the state of an optimizer."""

    def __init__(self, rows: Sequence[tuple[Mapping[str, Any], str, Tensor]]) -> None:
        """``rows``: the state of a parameter with the tensor that it holds under a name, those of one in a row."""
        self._states = [state for state, _, _ in rows]
        self._names = [name for _, name, _ in rows]
        self._tensors = [tensor for _, _, tensor in rows]
        # C++ knows dicts only.
        self._are_dicts = all(isinstance(state, dict) for state in self._states)

    def hold(self) -> bool:
        """Whether they are all still there."""
        if _native is not None and self._are_dicts:
            holds: bool = _native.entries_hold(self._states, self._names, self._tensors)
            return holds
        try:
            return all(map(is_, map(getitem, self._states, self._names), self._tensors))
        except KeyError:
            return False
