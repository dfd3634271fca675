"""Unscaling in the step: what ``torch.amp.GradScaler`` says of the gradients, without the host reading any of it.

It is written into the tables of a batch by operations on the device. So no step waits for it, a CUDA graph takes it
anew at every replay, and the kernels need not know of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formulas.tables import Column, Hyper


@dataclass(frozen=True)
class LossScale:
    """What GradScaler tells an optimizer that unscales in its step, in tensors of one element, or None.

    ``scale``: what the gradients are to be divided by; None where that has been done. ``found_inf``: not 0 where some
    gradient was not finite, so that the step is to be skipped; None where there is nothing to skip for.
    """

    scale: Tensor | None = None
    found_inf: Tensor | None = None

    @classmethod
    def of(cls, optimizer: Any) -> "LossScale":
        """From the attributes that GradScaler gives the optimizer for the time of its step, as torch's fused ones have.

        Raises TypeError or ValueError for a scale that is no tensor of one element.
        """
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if scale is not None and not isinstance(scale, Tensor):
            raise TypeError(f"grad_scale={scale!r}: GradScaler sets a tensor of one element; to set it, do so too")
        if scale is not None and scale.numel() != 1:
            raise ValueError(f"grad_scale is a tensor of shape {tuple(scale.shape)}: it must hold one number")
        if isinstance(found_inf, Tensor) and found_inf.numel() != 1:
            raise ValueError(f"found_inf is a tensor of shape {tuple(found_inf.shape)}: it must hold one number")
        # Without any gradient GradScaler has nothing to add up, and sets the number 0.
        return cls(scale, found_inf if isinstance(found_inf, Tensor) else None)


class ScaledTables:
    """The parts of a batch's tables that the loss scale decides: modified in place, on the device.

    ``tensors`` and ``hypers`` are the batch's; ``fresh`` (tensors,), int64, is 1 where the state has yet to take its
    first gradient. A step that is skipped takes none, which the host does not learn, so that is kept track of here.
    """

    def __init__(self, tensors: Tensor, hypers: Tensor, fresh: Tensor) -> None:
        self._tensors, self._hypers, self._fresh = tensors, hypers, fresh

    def apply(self, loss_scale: LossScale) -> Tensor:
        """Scale and mask the gradients of the coming step. Returns whether it is taken, 0-d int64 on the device.

        Expects the columns GRAD and HYPER as the host has them, HYPER with the rows for settled tensors.
        """
        home = self._hypers.device
        signs = self._hypers[:, Hyper.GRAD_SCALE]
        factor = torch.ones((), dtype=torch.float64, device=home)
        if loss_scale.scale is not None:
            scale = loss_scale.scale.detach().reshape(()).to(home, non_blocking=True)
            factor = scale.double().reciprocal()
        # Keeps the sign of maximize, whatever the scale of the last step was.
        signs.copy_(torch.copysign(factor, signs))
        taken = torch.ones((), dtype=torch.int64, device=home)
        if loss_scale.found_inf is not None:
            found = loss_scale.found_inf.detach().reshape(()).to(home, non_blocking=True)
            taken = (found == 0).long()
        # To the kernels a tensor without the address of a gradient is one that they must leave alone.
        addresses = self._tensors[:, Column.GRAD]
        addresses.mul_(taken)
        self._tensors[:, Column.HYPER].add_(self._fresh)
        return taken

    def settle(self) -> None:
        """After the step: whoever had a gradient in it is not fresh any more."""
        self._fresh.mul_(self._tensors[:, Column.GRAD] == 0)
