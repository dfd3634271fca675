"""The formulas on blocks of tensors: in the fewest operations that torch has for them, and on memory that is kept.

New memory costs more than what is computed in it: the system clears each page when it is touched first. So results lie
in buffers that a pool gives out, and takes back as soon as nobody knows them any more.
"""

import threading
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...state.modes import out_of_inference

#: Numbers below are numbers of every type that formulas run in.
LARGEST_SCALE = 2.0**100


class Pool(threading.local):
    """Memory for blocks on the CPU, of ``room`` elements each, kept for every thread that steps.

    Elsewhere, and for what is larger, tensors are new ones: torch keeps the memory of other devices by itself.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._free: dict[torch.dtype, list[Tensor]] = {}
        self._lent: dict[int, Tensor] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """Memory of this shape, with anything in it, until it is given back."""
        numel = prod(shape)
        if numel > self._room or (device is not None and device.type != "cpu"):
            return torch.empty(shape, dtype=dtype, device=device)
        free = self._free.setdefault(dtype, [])
        if free:
            flat = free.pop()
        else:
            with out_of_inference():
                flat = torch.empty(self._room, dtype=dtype, device="cpu")
        self._lent[flat.data_ptr()] = flat
        return flat[:numel].view(shape)

    def give(self, *tensors: Tensor) -> None:
        """Take these back: what lies in them is lost."""
        for tensor in tensors:
            flat = self._lent.pop(tensor.data_ptr(), None)
            if flat is not None:
                self._free[flat.dtype].append(flat)


class Value:
    """``scale * tensor``, or ``scale * tensor * other``, on which formulas compute as on a tensor.

    Products are only carried out where their value is needed: a sum takes them along. Adding ``scale * x`` in one
    operation rounds once, as compiled kernels do.
    """

    __slots__ = ("_kept", "_other", "_owned", "_pool", "_scale", "_tensor")

    def __init__(self, pool: Pool, tensor: Tensor, owned: bool = False) -> None:
        self._pool, self._tensor, self._owned = pool, tensor, owned
        self._scale: float = 1.0
        self._other: Tensor | None = None
        #: Those whose memory this needs.
        self._kept: tuple[Value, ...] = ()

    def __del__(self) -> None:
        if self._owned:
            self._pool.give(self._tensor)

    def _new(self) -> Tensor:
        return self._pool.take(self._tensor.shape, self._tensor.dtype, self._tensor.device)

    def _result(self, compute: Callable[..., Tensor], *operands: Any, **more: Any) -> "Value":
        return Value(self._pool, compute(*operands, out=self._new(), **more), owned=True)

    def _product(self, scale: float, other: Tensor | None, *kept: "Value") -> "Value":
        value = Value(self._pool, self._tensor)
        value._scale, value._other, value._kept = scale, other, kept
        return value

    @property
    def _addend(self) -> tuple[Tensor, Tensor | None, float]:
        """(tensor, other, scale), the scale one that torch takes for a number of any type."""
        if not abs(self._scale) < LARGEST_SCALE:
            _ = self.tensor
        return self._tensor, self._other, self._scale

    @property
    def tensor(self) -> Tensor:
        """What this is, carried out; the memory is this value's."""
        if self._other is not None or self._scale != 1:
            found = torch.mul(self._tensor, self._scale if self._other is None else self._other, out=self._new())
            if self._other is not None and self._scale != 1:
                found.mul_(self._scale)
            self._tensor, self._owned = found, True
            self._scale, self._other, self._kept = 1.0, None, ()
        return self._tensor

    def __mul__(self, other: "Value | Tensor | float") -> "Value":
        if isinstance(other, Value):
            _ = self.tensor
            return self._product(1.0, other.tensor, self, other)
        if isinstance(other, Tensor):
            return self._result(torch.mul, self.tensor, other)
        return self._product(self._scale * other, self._other, self, *self._kept)

    __rmul__ = __mul__

    def __add__(self, other: "Value | Tensor | float") -> "Value":
        if isinstance(other, Value):
            tensor, factor, scale = other._addend
            if factor is not None:
                return self._result(torch.addcmul, self.tensor, tensor, factor, value=scale)
            return self._result(torch.add, self.tensor, tensor, alpha=scale)
        tensor, factor, scale = self._addend
        if isinstance(other, Tensor) or factor is not None or scale == 1:
            return self._result(torch.add, self.tensor, other)
        number = torch.full((), other, dtype=tensor.dtype, device=tensor.device)
        return self._result(torch.add, number, tensor, alpha=scale)

    __radd__ = __add__

    def __sub__(self, other: "Value | Tensor | float") -> "Value":
        return self + other * -1.0

    def __truediv__(self, other: "Value") -> "Value":
        return self._result(torch.div, self.tensor, other.tensor)

    def __gt__(self, other: "Value | float") -> Tensor:
        found: Tensor = self.tensor > _plain(other)
        return found

    def __lt__(self, other: "Value | float") -> Tensor:
        found: Tensor = self.tensor < _plain(other)
        return found

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        found: Tensor = self.tensor == _plain(other)
        return found

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> "Value":
        """torch's functions of values: the formulas call ``where`` and ``sqrt``."""
        value = next(each for each in args if isinstance(each, Value))
        if function is torch.sqrt:
            return value._result(torch.sqrt, value.tensor)
        return Value(value._pool, function(*map(_plain, args), **(kwargs or {})))


def _plain(value: Any) -> Any:
    return value.tensor if isinstance(value, Value) else value
