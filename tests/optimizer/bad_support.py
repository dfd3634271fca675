"""What tests of bad parameters and of bad gradients share."""

from typing import Any

from torch import Tensor


class Wrapper(Tensor):
    """A tensor subclass whose data lies elsewhere, as a DTensor's or a quantized weight's does."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [each.inner if isinstance(each, cls) else each for each in args]
        return func(*args, **(kwargs or {}))

    def __repr__(self) -> str:
        return "Wrapper"


ids = {"ids": lambda case: case.name}
