"""Gradient noise: the noise scale of SGD, and the covariance of mini-batch gradients."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import check_model, check_plain, undisturbed
from .spectrum import PART, Spectrum, precise, spectrum_of


def noise_scale(lr: float, batch_size: int) -> float:
    """lr / batch size, which together with the gradients' covariance sets the noise of SGD. ValueError if negative."""
    for name, value in (("lr", lr), ("batch_size", batch_size)):
        if not 0.0 <= value < math.inf or (value == 0 and name == "batch_size"):
            raise ValueError(f"{name}={value!r}: must be a finite number {'>' if name == 'batch_size' else '>='} 0")
    return float(lr) / float(batch_size)


def gradient_covariance(model: nn.Module, loss: Callable[[Any], Tensor], batches: Sequence[Any]) -> Spectrum:
    """The L largest eigenvalues of K = 1/L sum_i (g_i - g)(g_i - g)^T over the gradients of L mini-batches.

    From the (L, L) matrix of their products, which has the same eigenvalues but for zeros; at most L - 1 are not zero.
    Their sum is the trace of K. (Jastrzebski et al., The break-even point on optimization trajectories.)

    Args:
        model: in the mode (training or evaluation) in which it is to be measured. A sharded or wrapped one (DDP): pass
            what is inside.
        loss: takes one of ``batches`` to a tensor of one element, through ``model``.
        batches: two or more.

    Nothing of the training changes: ``.grad``, buffers (batch norm) and torch's random states stay as they are. Memory:
    L times the gradients, and the graph of one batch; buffers are copied. Time: L forward and backward passes, and
    L^2 n multiply-adds in float64 for n parameters.

    Raises TypeError or ValueError for fewer than two batches, a model without plain trainable parameters, and losses
    that are no tensor of one element.
    """
    check_model(model)
    if len(batches) < 2:
        raise ValueError(f"batches: {len(batches)} given, a covariance needs two or more")
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise ValueError(f"model: no parameter of this {type(model).__name__} requires a gradient")
    for name, param in named:
        check_plain(name, param)
    params = [param for _, param in named]
    with undisturbed(model):
        rows = [_gradients(params, loss(batch)) for batch in batches]
    return spectrum_of(_centred_gram(rows) / len(rows))


def _gradients(params: Sequence[Tensor], loss: Any) -> list[Tensor]:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"loss returned {what}: it must return a tensor of one element, such as a mean")
    if not loss.requires_grad:
        raise ValueError("loss returned a tensor without a graph: compute it through the model, without no_grad")
    # Unlike backward(), it neither touches .grad nor runs the hooks of optimizers that step inside of it.
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return [_dense(grad, param) for grad, param in zip(grads, params, strict=True)]


def _dense(grad: Tensor | None, param: Tensor) -> Tensor:
    grad = torch.zeros_like(param) if grad is None else grad
    return (grad if grad.layout == torch.strided else grad.to_dense()).detach().flatten()


def _centred_gram(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """The products of every two gradients less their mean: (L, L), float64, on the first parameter's device."""
    count = len(rows)
    gram: Tensor | None = None
    for column in zip(*rows, strict=True):
        for parts in zip(*(grad.split(max(1, PART // count)) for grad in column), strict=True):
            part = torch.stack([precise(each) for each in parts])
            part -= part.mean(0)
            product = part @ part.T
            gram = product if gram is None else gram.add_(product.to(gram.device))
    assert gram is not None
    return gram
