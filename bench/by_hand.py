"""Layca as one would write it with torch alone: tensor by tensor, on lists of tensors, and compiled.

Each function makes a step for :class:`bench.providers.Provider` from a base ("sgd", "momentum" or "adam").
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from layca_fast.state.layout import is_vector

MOMENTUM, BETAS, EPS, RATE = 0.9, (0.9, 0.999), 1e-8, 1e-3

#: State tensors that each base keeps.
BUFFERS = {"sgd": 0, "momentum": 1, "adam": 2}

Step = Callable[[], object]
Rotate = Callable[[Tensor, Tensor, Tensor], object]


def direction(base: str, grad: Tensor, buffers: Sequence[Tensor], correction: Tensor) -> Tensor:
    """Advance ``buffers`` in place and return the base step, for Adam without the factor that no direction depends on.

    ``correction``: sqrt(1 - beta2^t), 0-d.
    """
    if base == "sgd":
        return grad
    if base == "momentum":
        return buffers[0].mul_(MOMENTUM).add_(grad)
    exp_avg, exp_avg_sq = buffers
    exp_avg.lerp_(grad, 1 - BETAS[0])
    exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    return exp_avg / exp_avg_sq.sqrt().div_(correction).add_(EPS)


def directions(base: str, grads: list[Tensor], buffers: Sequence[list[Tensor]], correction: Tensor) -> list[Tensor]:
    """The same for lists of tensors."""
    if base == "sgd":
        return grads
    if base == "momentum":
        torch._foreach_mul_(buffers[0], MOMENTUM)
        torch._foreach_add_(buffers[0], grads)
        return buffers[0]
    exp_avgs, exp_avg_sqs = buffers
    torch._foreach_lerp_(exp_avgs, grads, 1 - BETAS[0])
    torch._foreach_mul_(exp_avg_sqs, BETAS[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - BETAS[1])
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, correction)
    torch._foreach_add_(denominators, EPS)
    return list(torch._foreach_div(exp_avgs, denominators))


class Corrections:
    """Adam's bias corrections, step by step; the other bases have none."""

    def __init__(self, base: str) -> None:
        self.adam = base == "adam"
        self.steps = 0

    def next(self) -> tuple[Tensor, float]:
        """The correction that :func:`direction` takes, and the rate of the tensors that do not rotate."""
        if not self.adam:
            return torch.tensor(1.0), RATE
        self.steps += 1
        correction = torch.tensor(math.sqrt(1 - BETAS[1] ** self.steps), dtype=torch.float64)
        return correction, RATE / (1 - BETAS[0] ** self.steps)


def coefficients(ww: Tensor, wu: Tensor, uu: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """The closed form: w = a*w + b*u turns w by atan(RATE) and gives it the norm ``radius``."""
    norm, cosine = ww.sqrt(), 1 / math.sqrt(1 + RATE**2)
    sigma = (uu - wu * wu / ww).sqrt()
    return radius / norm * cosine * (1 + RATE * wu / (norm * sigma)), -radius * RATE * cosine / sigma


def four_operations(param: Tensor, step: Tensor, radius: Tensor) -> None:
    """Project, scale, step, renormalise, as the paper's Algorithm 1 has it."""
    norm = param.norm()
    projected = step - (step * param).sum() / norm**2 * param
    scaled = projected * (norm / projected.norm())
    param.sub_(RATE * scaled)
    param.mul_(radius / param.norm())


def closed_form(param: Tensor, step: Tensor, radius: Tensor) -> None:
    """Three dots and one linear combination."""
    w, u = param.view(-1), step.view(-1)
    a, b = coefficients(torch.dot(w, w), torch.dot(w, u), torch.dot(u, u), radius)
    # addcmul_ takes b as a tensor: as the number that add_ wants, the host would wait for it on a GPU.
    w.mul_(a).addcmul_(u, b)


def per_tensor(base: str, rotate: Rotate) -> Callable[[Sequence[Tensor]], Step]:
    """A loop over the tensors."""

    def make(params: Sequence[Tensor]) -> Step:
        buffers = [[torch.zeros_like(param) for _ in range(BUFFERS[base])] for param in params]
        radii = [param.detach().norm() for param in params]
        corrections = Corrections(base)

        @torch.no_grad()
        def step() -> None:
            correction, plain_rate = corrections.next()
            for param, states, radius in zip(params, buffers, radii, strict=True):
                assert param.grad is not None
                update = direction(base, param.grad, states, correction)
                if is_vector(param):
                    param.sub_(update, alpha=plain_rate)
                else:
                    rotate(param, update, radius)

        return step

    return make


@cache
def compiled_layer_step(base: str) -> Callable[..., None]:
    """One layer's base step and closed form, compiled for all sizes: a graph per shape would take minutes."""
    # Each base, and each number of dimensions that a flat view comes from, is compiled anew, in less than a second.
    torch.compiler.config.recompile_limit = 64

    def layer_step(w: Tensor, grad: Tensor, buffers: list[Tensor], radius: Tensor, correction: Tensor) -> None:
        u = direction(base, grad, buffers, correction)
        a, b = coefficients((w * w).sum(), (w * u).sum(), (u * u).sum(), radius)
        w.copy_(a * w + b * u)

    return torch.compile(layer_step, dynamic=True, fullgraph=True)


def compiled(base: str) -> Callable[[Sequence[Tensor]], Step]:
    """A loop over the tensors that calls one compiled function."""

    def make(params: Sequence[Tensor]) -> Step:
        buffers = [[torch.zeros_like(param).view(-1) for _ in range(BUFFERS[base])] for param in params]
        flat = [param.detach().view(-1) for param in params]
        radii = [param.norm() for param in flat]
        corrections, layer_step = Corrections(base), compiled_layer_step(base)

        @torch.no_grad()
        def step() -> None:
            correction, plain_rate = corrections.next()
            for param, w, states, radius in zip(params, flat, buffers, radii, strict=True):
                assert param.grad is not None
                grad = param.grad.view(-1)
                if is_vector(param):
                    w.sub_(direction(base, grad, states, correction), alpha=plain_rate)
                else:
                    layer_step(w, grad, states, radius, correction)

        return step

    return make


def foreach(base: str) -> Callable[[Sequence[Tensor]], Step]:
    """The closed form on lists of tensors. There is no list operation for dots, so each is a product and a sum."""

    def make(params: Sequence[Tensor]) -> Step:
        rotating = [index for index, param in enumerate(params) if not is_vector(param)]
        resting = [index for index, param in enumerate(params) if is_vector(param)]
        buffers = [[torch.zeros_like(param) for param in params] for _ in range(BUFFERS[base])]
        turned, plain = ([params[index] for index in indices] for indices in (rotating, resting))
        radii = torch.stack(torch._foreach_norm(turned)).detach()
        corrections = Corrections(base)

        @torch.no_grad()
        def step() -> None:
            correction, plain_rate = corrections.next()
            grads = [param.grad for param in params if param.grad is not None]
            updates = directions(base, grads, buffers, correction)
            turns, rests = ([updates[index] for index in indices] for indices in (rotating, resting))
            ww = torch.stack(torch._foreach_norm(turned)).square()
            wu = torch.stack([product.sum() for product in torch._foreach_mul(turned, turns)])
            uu = torch.stack(torch._foreach_norm(turns)).square()
            a, b = coefficients(ww, wu, uu, radii)
            torch._foreach_mul_(turned, a.unbind())
            torch._foreach_add_(turned, torch._foreach_mul(turns, b.unbind()))
            if plain:
                torch._foreach_add_(plain, rests, alpha=-plain_rate)

        return step

    return make
