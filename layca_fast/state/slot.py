"""One parameter's place in a batch: its tensors, as kernels see them, and what is asked of its step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..formulas.bases import Base
from ..formulas.options import waits
from ..formulas.rotation import RULES
from ..formulas.tables import Flag
from .checks import check_gradient
from .cut import Cut
from .sharding import Piece, local_gradient


@dataclass
class Slot:
    """One parameter's place in a batch.

    ``states`` are the buffers of the formula in its order, ``step`` the 0-d float32 number of steps taken (None where
    the formula does not count them), ``radius`` the float64 state (None where the tensor does not rotate), ``layers``
    the number of equal slices, ``dense`` whether these lie in memory one after the other, ``fresh`` whether the state
    was created for the coming step. ``entry`` is what the optimizer keeps for the parameter: the states by their names.
    ``remainder`` completes a 16-bit parameter (compensation.py); None where it has none. ``whole`` is the
    parameter of which ``param``, like the states, is the ``piece`` that lies here (None: ``param`` is it), ``cut`` how
    that is cut into layers (None: it is one), ``start`` the number of the first that this process knows among all, and
    ``number`` its place among the tensors that are summed over processes.
    """

    param: Tensor
    group: Mapping[str, Any]
    base: Base
    label: str
    states: tuple[Tensor, ...]
    step: Tensor | None
    radius: Tensor | None
    layers: int
    dense: bool
    fresh: bool
    entry: Mapping[str, Any] = field(default_factory=dict)
    remainder: Tensor | None = None
    whole: Tensor | None = None
    piece: Piece = field(default_factory=lambda: Piece(0, 1))
    cut: Cut | None = None
    start: int = 0
    number: int = 0

    @property
    def owner(self) -> Tensor:
        """The parameter as the user knows it."""
        return self.param if self.whole is None else self.whole

    def gradient(self, dtype: torch.dtype) -> Tensor | None:
        """This step's gradient, checked, with the parameter's strides where kernels walk both as one run of memory."""
        grad = self.owner.grad
        if grad is None:
            return None
        check_gradient(grad, self.owner, self.label)
        grad = self.piece.of(local_gradient(grad, self.owner)).resolve_neg().to(dtype)
        if not self.dense or grad.stride() == self.param.stride():
            return grad
        return torch.empty_like(self.param, dtype=dtype).copy_(grad)

    @property
    def layer_dims(self) -> int:
        """How many of the last dimensions of ``param`` are those of one layer."""
        return self.param.dim() if self.cut is None else self.cut.dims

    @property
    def flags(self) -> int:
        if self.radius is None:
            return 0
        current = Flag.CURRENT if self.group["radius"] == "current" else 0
        waiting = Flag.WAITS if waits(self.group) else 0
        return Flag.ROTATES | current | waiting | (Flag.PART if self.piece.is_part else 0)

    @property
    def rule(self) -> int:
        return RULES[self.group["rule"]]
