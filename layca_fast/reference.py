"""The specification: Layca's Algorithm 1 (arXiv 1806.01603) as the paper writes it, one tensor at a time.

Four operations on one layer: project the base step orthogonal to the weights, scale it to their norm, take rho of it,
and put the result back on the sphere. Nothing here is shared with the backends, and nothing is clever: no closed form,
no batches, no cache of anything. Run it in float64 and compare.
"""

import itertools
import math
from collections.abc import Callable, Sequence
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


def _average(state: dict[str, Any], name: str, value: Tensor, decay: float) -> Tensor:
    """Advance the exponential moving average of ``value`` that ``state[name]`` holds, from 0, and return it."""
    state[name] = decay * state.get(name, torch.zeros_like(value)) + (1 - decay) * value
    average: Tensor = state[name]
    return average


def rmsprop(
    grad: Tensor,
    state: dict[str, Any],
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
) -> Tensor:
    """The step of torch.optim.RMSprop: g over the root of the mean square, or of the variance where centered."""
    spread = _average(state, "square_avg", grad.square(), alpha)
    if centered:
        spread = spread - _average(state, "grad_avg", grad, alpha).square()
    step = finite(grad / (spread.sqrt() + eps))
    if momentum == 0:
        return step
    state["momentum_buffer"] = momentum * state.get("momentum_buffer", torch.zeros_like(grad)) + step
    buffer: Tensor = state["momentum_buffer"]
    return buffer


def adagrad(grad: Tensor, state: dict[str, Any], eps: float = 1e-10, initial_accumulator_value: float = 0.0) -> Tensor:
    """The step of torch.optim.Adagrad without lr_decay: g over the root of the sum of all g^2 so far."""
    state["sum"] = state.get("sum", torch.full_like(grad, initial_accumulator_value)) + grad.square()
    total: Tensor = state["sum"]
    return grad / (total.sqrt() + eps)


def adam(
    grad: Tensor,
    state: dict[str, Any],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    amsgrad: bool = False,
) -> Tensor:
    """The step of torch.optim.Adam (arXiv 1412.6980, Algorithm 1; amsgrad: arXiv 1904.09237)."""
    state["step"] = state.get("step", 0) + 1
    mean = _average(state, "exp_avg", grad, betas[0]) / (1 - betas[0] ** state["step"])
    square = _average(state, "exp_avg_sq", grad.square(), betas[1])
    if amsgrad:
        state["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", square), square)
        square = state["max_exp_avg_sq"]
    step: Tensor = mean / ((square / (1 - betas[1] ** state["step"])).sqrt() + eps)
    return step


def lion(grad: Tensor, state: dict[str, Any], betas: tuple[float, float] = (0.9, 0.99)) -> Tensor:
    """Lion (arXiv 2302.06675, Algorithm 2): the sign of a mean, whose memory decays at another rate."""
    memory = state.get("exp_avg", torch.zeros_like(grad))
    _average(state, "exp_avg", grad, betas[1])
    return torch.sign(betas[0] * memory + (1 - betas[0]) * grad)


def muon(
    grad: Tensor,
    state: dict[str, Tensor],
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: Sequence[float] = (3.4445, -4.775, 2.0315),
    eps: float = 1e-7,
    ns_dtype: Any = None,
    adjust_lr: str | None = None,
    chunks: Any = 1,
) -> Tensor:
    """The step of torch.optim.Muon, which is a matrix's, for each of the matrices that ``chunks`` cuts.

    m <- mu m + (1 - mu) g from m = 0; the step is the Newton-Schulz image of m, or of Nesterov's mu m + (1 - mu) g.
    ``ns_dtype`` says nothing here: all is computed in the type of ``grad``.
    """
    average = _average(state, "momentum_buffer", grad, momentum)
    ahead = momentum * average + (1 - momentum) * grad if nesterov else average
    result = torch.empty_like(ahead)
    for piece, place in zip(slices(ahead, chunks), slices(result, chunks), strict=True):
        # Of a convolution, all but its first dimension are columns.
        matrix = matrix_of(piece, chunks)
        matrix = matrix.reshape(len(matrix), -1)
        rows, columns = matrix.shape
        adjusted = (
            0.2 * max(rows, columns) ** 0.5 if adjust_lr == "match_rms_adamw" else max(1, rows / max(columns, 1)) ** 0.5
        )
        place.copy_(adjusted * newton_schulz(matrix, ns_steps, ns_coefficients, eps).reshape(piece.shape))
    return result


def newton_schulz(matrix: Tensor, steps: int, coefficients: Sequence[float], eps: float) -> Tensor:
    """Jordan's iteration, from the matrix over its norm: of each singular value s it makes a s + b s^3 + c s^5."""
    a, b, c = coefficients
    x: Tensor = matrix / torch.linalg.matrix_norm(matrix).clamp(min=eps)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


BASES: dict[str, Callable[..., Tensor]] = {
    "sgd": sgd,
    "sgd_amom": sgd_amom,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "adam": adam,
    "lion": lion,
    "muon": muon,
}


def slices(tensor: Tensor, chunks: Any) -> list[Tensor]:
    """The layers that a tensor holds: views of it.

    ``chunks``: a number of equal slices of the first dimension, their sizes, or "all" for slices of one; "matrices" for
    the last two dimensions at each index of the others, ("matrices", n) for each of these in n; "columns" for slices
    of one of the second dimension, ("columns", ...) for others. A layer of columns has the dimension that is cut first.
    """
    kind: str = chunks if isinstance(chunks, str) else ""
    how: Any = None if kind else chunks
    if isinstance(chunks, (tuple, list)) and isinstance(chunks[0], str):
        kind, how = chunks
    if kind == "matrices":
        places = itertools.product(*map(range, tensor.shape[:-2]))
        matrices = [tensor[place] for place in places] if tensor.dim() > 2 else [tensor]
        return [part for matrix in matrices for part in slices(matrix, 1 if how is None or tensor.dim() < 2 else how)]
    if kind == "columns":
        return slices(tensor.transpose(0, 1), "all" if how is None else how)
    if kind == "all":
        how = len(tensor)
    if isinstance(how, (tuple, list)):
        return list(tensor.split(list(how)))
    return [tensor] if how == 1 else list(tensor.chunk(how))


def matrix_of(piece: Tensor, chunks: Any) -> Tensor:
    """The matrix that a layer is: a slice of stacked ones is one of them. Parts of given sizes have rows."""
    how = chunks[1] if isinstance(chunks, (tuple, list)) and isinstance(chunks[0], str) else chunks
    is_slice = how != 1 and not isinstance(how, (tuple, list))
    return piece[0] if is_slice and piece.dim() > 2 and len(piece) == 1 else piece


def finite(x: Tensor) -> Tensor:
    """``x`` with 0 where it is not finite (appendix A.2.4)."""
    return torch.where(torch.isfinite(x), x, 0.0)


def orthogonal_part(weight: Tensor, step: Tensor) -> Tensor:
    """``step`` without its component along ``weight``."""
    return step - (step * weight).sum() / weight.square().sum() * weight


def has_direction(weight: Tensor, step: Tensor) -> bool:
    """Whether ``step`` leaves the line of ``weight``: otherwise there is nothing to turn towards."""
    length = torch.linalg.vector_norm(orthogonal_part(weight, step))
    return bool(length > SMALLEST_SINE * torch.linalg.vector_norm(step))


def cosine(weight: Tensor, grad: Tensor) -> float:
    """Of the angle between weights and gradient; 0 where there is none."""
    lengths = float(torch.linalg.vector_norm(weight) * torch.linalg.vector_norm(grad))
    return float((weight * grad).sum()) / lengths if lengths > 0 else 0.0


def go(weight: Tensor, direction: Tensor, lr: float, radius: float | None) -> Tensor:
    """``weight`` after lr of its norm against ``direction``, on the sphere of ``radius`` (None: of its norm)."""
    norm = torch.linalg.vector_norm(weight)
    moved = weight - lr * (direction * norm / torch.linalg.vector_norm(direction))
    rotated: Tensor = moved * (norm if radius is None else radius) / torch.linalg.vector_norm(moved)
    return rotated


def layca(weight: Tensor, step: Tensor, lr: float, radius: float | None) -> Tensor:
    """Algorithm 1 on one layer: project the step, and go there. Returns the new weights; radius as in :func:`go`."""
    return go(weight, orthogonal_part(weight, step), lr, radius) if has_direction(weight, step) else weight


def hyperball(weight: Tensor, step: Tensor, lr: float, radius: float | None) -> Tensor:
    """The same without the projection (arXiv 2606.16899)."""
    return go(weight, step, lr, radius) if has_direction(weight, step) else weight


RULES: dict[str, Callable[..., Tensor]] = {"layca": layca, "hyperball": hyperball}

#: What a rule turns by, in radians, at a rate ``lr`` where weights and step are ``phi`` apart.
ANGLES: dict[str, Callable[[float, float], float]] = {
    "layca": lambda lr, phi: math.atan(lr),
    "hyperball": lambda lr, phi: math.atan2(lr * math.sin(phi), 1 - lr * math.cos(phi)),
}


def weight_of(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 weights that a 16-bit parameter and its ``remainder`` state stand for.

    Such a parameter trains as a float32 one that starts from the same numbers, so its specification is the step below
    on these weights. The remainder is a signed 16-bit integer, as raw bits in a tensor of the parameter's shape and
    type. Of bfloat16 it counts steps between neighbouring float32 numbers, away from zero where it is positive; of
    float16 it counts parts of the distance between neighbouring float16 numbers, 2**16 of them. What is not finite has
    no remainder.
    """
    count = remainder.view(torch.int16).long()
    if param.dtype == torch.bfloat16:
        weight = (param.float().view(torch.int32).long() + count).int().view(torch.float32)
    else:
        exponent = torch.frexp(param.double().abs().clamp(min=2.0**-14)).exponent
        weight = (param.double() + count * 2.0 ** (exponent - 11 - 16)).float()
    return torch.where(param.isfinite(), weight, param.float())


def given(radius: float | Callable[[tuple[int, int]], float], layer: Tensor) -> float:
    """A radius that is no property of the weights: a number, or a function of the layer's rows and columns."""
    if not callable(radius):
        return float(radius)
    rows = len(layer) if layer.dim() > 0 else 1
    return float(radius((rows, layer.numel() // rows)))


def reference_step(
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    base: str = "sgd",
    rule: str = "layca",
    rotate: bool | None = None,
    chunks: Any = 1,
    radius: str | float | Callable[[tuple[int, int]], float] = "initial",
    radius_lr: float = 9.0,
    joins_at: float = 0.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    **base_options: Any,
) -> Tensor:
    """One step of ``FusedLayca`` on one tensor: ``weight`` and ``state`` (a dict, empty at first) change in place.

    Returns the base step.

    ``weight`` and ``grad`` share shape and dtype (any floating one). The arguments are those of ``FusedLayca``.
    Non-finite elements of the gradient count as zero (appendix A.2.4). A tensor that does not rotate takes the plain
    base step with decoupled weight decay.
    """
    grad = finite(grad)
    if base == "muon":
        base_options["chunks"] = chunks
    step = finite(BASES[base](-grad if maximize else grad, state, **base_options))
    if not (sum(size > 1 for size in weight.shape) >= 2 if rotate is None else rotate):
        weight.copy_(weight - lr * (step + weight_decay * weight))
        return step
    ascent = -grad if maximize else grad
    layers = list(zip(slices(weight, chunks), slices(step, chunks), slices(ascent, chunks), strict=True))
    radii = state.setdefault("radius", [None] * len(layers))
    # A radius that has been taken is the sign that a layer has joined.
    waits = [
        joins_at > 0 and known is None and layer.norm() < joins_at
        for known, (layer, _, _) in zip(radii, layers, strict=True)
    ]
    for i, (layer, direction, gradient) in enumerate(layers):
        if waits[i]:
            layer.copy_(layer - lr * direction)
            continue
        if lr == 0 or not has_direction(layer, direction):
            continue
        if radii[i] is None and (radius != "current" or joins_at > 0):
            radii[i] = layer.norm().item() if isinstance(radius, str) else given(radius, matrix_of(layer, chunks))
        if radius == "learned":
            radii[i] *= math.exp(-min(radius_lr * lr, 1.0) * cosine(layer, gradient))
        layer.copy_(RULES[rule](layer, direction, lr, None if radius == "current" else radii[i]))
    return step
