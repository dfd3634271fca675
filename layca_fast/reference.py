"""The specification: Layca's Algorithm 1 (arXiv 1806.01603) as the paper writes it, one tensor at a time.

Four operations on one layer: project the base step orthogonal to the weights, scale it to their norm, take rho of it,
and put the result back on the sphere. Nothing here is shared with the backends, and nothing is clever: no closed form,
no batches, no cache of anything. Run it in float64 and compare.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: The sine of the angle between weights and step below which there is no direction to turn in.
SMALLEST_SINE = 4 * torch.finfo(torch.float32).eps


def sgd(
    grad: Tensor, state: dict[str, Tensor], momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False
) -> Tensor:
    """The step of torch.optim.SGD: v <- mu v + (1 - dampening) g, where the first v is g."""
    if momentum == 0:
        return grad
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = grad.clone()
    else:
        state["momentum_buffer"] = momentum * state["momentum_buffer"] + (1 - dampening) * grad
    velocity = state["momentum_buffer"]
    return grad + momentum * velocity if nesterov else velocity


def sgd_amom(grad: Tensor, state: dict[str, Tensor], momentum: float = 0.9) -> Tensor:
    """SGD with averaging momentum, the paper's: m <- mu m + (1 - mu) g from m = 0, and the step is m."""
    average = state.get("momentum_buffer", torch.zeros_like(grad))
    state["momentum_buffer"] = momentum * average + (1 - momentum) * grad
    return state["momentum_buffer"]


BASES: dict[str, Callable[..., Tensor]] = {"sgd": sgd, "sgd_amom": sgd_amom}


def layca(weight: Tensor, step: Tensor, lr: float, radius: float | None) -> Tensor:
    """Algorithm 1 on one layer: returns the new weights; ``radius`` None keeps the norm that they have now.

    Where the step has no part orthogonal to the weights, there is nothing to turn towards: returns ``weight``.
    """
    norm = torch.linalg.vector_norm(weight)
    orthogonal = step - (step * weight).sum() / norm**2 * weight
    length = torch.linalg.vector_norm(orthogonal)
    if lr == 0 or not length > SMALLEST_SINE * torch.linalg.vector_norm(step):
        return weight
    moved = weight - lr * (orthogonal * norm / length)
    rotated: Tensor = moved * (norm if radius is None else radius) / torch.linalg.vector_norm(moved)
    return rotated


def reference_step(
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    base: str = "sgd",
    rotate: bool | None = None,
    chunks: int | str = 1,
    radius: str = "initial",
    weight_decay: float = 0.0,
    maximize: bool = False,
    **base_options: Any,
) -> None:
    """One step of ``FusedLayca`` on one tensor: ``weight`` and ``state`` (a dict, empty at first) change in place.

    ``weight`` and ``grad`` share shape and dtype (any floating one). The arguments are those of ``FusedLayca``.
    Non-finite elements of the gradient count as zero (appendix A.2.4). A tensor that does not rotate takes the plain
    base step with decoupled weight decay.
    """
    grad = torch.where(torch.isfinite(grad), grad, 0.0)
    step = BASES[base](-grad if maximize else grad, state, **base_options)
    step = torch.where(torch.isfinite(step), step, 0.0)
    if not (weight.dim() >= 2 if rotate is None else rotate):
        weight.copy_(weight - lr * (step + weight_decay * weight))
        return
    slices = [(weight, step)]
    if chunks != 1:
        count = len(weight) if chunks == "all" else int(chunks)
        slices = list(zip(weight.chunk(count), step.chunk(count), strict=True))
    radii = state.setdefault("radius", [None] * len(slices))
    for i, (layer, direction) in enumerate(slices):
        rotated = layca(layer, direction, lr, radii[i])
        if radius == "initial" and radii[i] is None and not torch.equal(rotated, layer):
            radii[i] = layer.norm().item()
        layer.copy_(rotated)
