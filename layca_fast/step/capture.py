"""What must hold while a CUDA graph records a step: a replay runs its kernels again, and nothing on the host."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..messages import describe, labelled

#: What runs on other devices runs once, while the graph is recorded, and is no part of it.
RECORDED_DEVICES = ("cuda",)


def is_capturing() -> bool:
    """Whether the current stream records its work into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_capture(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise RuntimeError, naming the parameter, where replays of the step being recorded could not be what it says."""
    for group, label, param in labelled(groups):
        name = describe(label, param)
        if not group.get("capturable"):
            raise RuntimeError(
                f"a CUDA graph is being captured, but capturable={group.get('capturable', False)!r} for {name}: make "
                "the optimizer with FusedLayca(..., capturable=True), or set it in the group"
            )
        if param.device.type not in RECORDED_DEVICES:
            raise RuntimeError(
                f"{name} is on {param.device}: a CUDA graph repeats only what runs on the GPU; move it there, or leave "
                "it to an optimizer that steps outside of the capture"
            )
        if param.requires_grad and param.grad is None:
            raise RuntimeError(
                f"{name} has no gradient in the step being captured, so no replay would ever train it: capture the "
                "backward pass that makes it, or freeze the parameter with requires_grad_(False)"
            )
