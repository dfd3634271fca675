"""Norm propagation at initialisation: whether signals and gradients keep their size from layer to layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import check_model, check_plain, first_of, undisturbed
from .rows import batched, choose_layers, input_rows, output_rows
from .spectrum import precise


@dataclass(frozen=True)
class NormRatios:
    """One layer, root mean squares over the samples.

    ``activation``: |h| / |x|, of the layer's input h and the model's input x. ``gradient``: |dL/dW|_F / (|x| |e|), of
    one sample's gradient and its error e = dL/d(output of the model). With He's initialisation (variance 2 / outputs of
    the layer) and ReLU between layers of equal width both stay near 1 (Arpit and Bengio, The benefits of
    over-parameterization at initialization in deep ReLU networks).
    """

    activation: float
    gradient: float


@dataclass
class _Seen:
    """A layer's inputs and the gradients at its outputs, call by call."""

    inputs: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)


def norm_propagation(
    model: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor], layers: Sequence[str] | None = None
) -> dict[str, NormRatios]:
    """Norms of every layer's input and of its weight gradient, sample by sample, from one forward and backward pass.

    Args:
        model: takes ``inputs`` to one tensor; in the mode in which it is to be measured; not sharded (DTensor, FSDP2).
        inputs: floating, of shape (N, ...).
        loss: takes the output to a tensor: one element, a sum or mean over samples, or a loss per sample.
        layers: names of Linear, Conv1d, Conv2d or Conv3d modules with trainable weights; None: all that there are.

    Nothing of the model changes: ``.grad``, buffers and torch's random states stay as they are. With batch norm in
    training mode a sample's gradient is what came through its own positions. Memory: inputs and output gradients of
    the layers, and one sample's patches and weight gradient in float64. Time: one forward and backward pass, and the
    multiply-adds of the weight gradients again, in float64.

    Samples of zero norm or error are left out. Layers that the pass does not call, or that no gradient reaches, are not
    in the result. Raises TypeError or ValueError for arguments that it cannot take.
    """
    check_model(model)
    _check_inputs(inputs)
    chosen = choose_layers(model, layers, patches=True, way_out="leave it out of layers")
    weights: dict[str, Tensor] = {name: layer.get_parameter("weight") for name, layer in chosen.items()}
    for name, weight in weights.items():
        check_plain(f"{name}.weight" if name else "weight", weight)
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen:
        raise ValueError(f"layers {frozen} have weights that require no gradient: leave them out of layers")
    seen = {name: _Seen() for name in chosen}
    errors: list[Tensor] = []
    handles = [
        layer.register_forward_hook(partial(_note, seen[name], name), with_kwargs=True)
        for name, layer in chosen.items()
    ]
    try:
        with undisturbed(model):
            outputs = first_of(model(inputs), {}, "the output of model")
            outputs.register_hook(errors.append)
            torch.autograd.grad(loss(outputs).sum(), list(weights.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    sizes = _norms(inputs)
    scale = sizes * _norms(errors[0])
    return {
        name: _ratios(chosen[name], each, sizes, scale) for name, each in seen.items() if each.inputs and each.gradients
    }


def _check_inputs(inputs: Any) -> None:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() < 2:
        raise TypeError("inputs must be a floating-point tensor of shape (N, ...): pass what follows an embedding")


def _note(seen: _Seen, name: str, layer: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> None:
    # Nothing overwrites it in place: the layer itself needs it for its weight's gradient.
    seen.inputs.append(first_of(args, kwargs, f"the input of layer {name!r}").detach())
    output.register_hook(partial(_keep, seen.gradients, len(seen.inputs) - 1))


def _keep(gradients: dict[int, Tensor], call: int, grad: Tensor) -> None:
    gradients[call] = grad.detach().clone()


def _ratios(layer: nn.Module, seen: _Seen, sizes: Tensor, scale: Tensor) -> NormRatios:
    activations = [_norms(batched(layer, each)) / sizes for each in seen.inputs]
    return NormRatios(
        _root_mean_square(torch.cat(activations)), _root_mean_square(_gradient_norms(layer, seen) / scale)
    )


def _gradient_norms(layer: nn.Module, seen: _Seen) -> Tensor:
    """Of each sample's weight gradient, the sum over its positions and calls: (N,)."""
    pairs = [(batched(layer, seen.inputs[call]), batched(layer, grad)) for call, grad in seen.gradients.items()]
    norms = []
    for sample in range(len(pairs[0][0])):
        parts = (_weight_gradient(layer, x[sample : sample + 1], g[sample : sample + 1]) for x, g in pairs)
        norms.append(torch.linalg.vector_norm(reduce(torch.add, parts)))
    return torch.stack(norms)


def _weight_gradient(layer: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Of one sample, (outputs, d)."""
    return output_rows(layer, precise(gradient))[0].T @ input_rows(layer, precise(inputs))[0]


def _norms(tensor: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(precise(tensor).flatten(1), dim=1)
    return norms


def _root_mean_square(values: Tensor) -> float:
    return float(values[values.isfinite()].square().mean().sqrt())
