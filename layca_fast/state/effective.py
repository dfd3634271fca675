"""The float32 weight that a 16-bit parameter and what an optimizer keeps of it stand for."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .checks import check_memory
from .compensation import HALVES, join
from .sharding import local_of, wrap


def effective_weight(param: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """A new tensor of the parameter's shape; ``entry`` is its state. Without a remainder that fits, a copy of it."""
    remainder = entry.get("remainder")
    check_memory(param, "the parameter")
    if remainder is None or param.dtype not in HALVES or remainder.dtype != param.dtype:
        return param.detach().clone()
    check_memory(remainder, "the state 'remainder' of the parameter")
    return wrap(join(local_of(param).detach(), local_of(remainder)), param)
