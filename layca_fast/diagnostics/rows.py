"""Linear layers and convolutions as one product of matrices: what multiplies the weights, and what it yields."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional

from .spectrum import PART

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)


def choose_layers(
    model: nn.Module, names: Sequence[str] | None, *, patches: bool, way_out: str
) -> dict[str, nn.Module]:
    """The linear layers and convolutions of ``model`` with these names, or all of them, by name.

    Raises ValueError for names of other modules, for a model without such layers, and, where the samples are unfolded
    patches, for grouped convolutions, whose weights do not multiply whole patches.
    """
    found: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    if not found:
        raise ValueError(f"model: this {type(model).__name__} has no Linear, Conv1d, Conv2d or Conv3d to measure")
    if names is not None:
        found = {name: _named(model, name, list(found)) for name in names}
    if not found:
        raise ValueError("layers=[]: name at least one layer, or pass None for all of them")
    for name, layer in found.items():
        if patches and getattr(layer, "groups", 1) > 1:
            raise ValueError(
                f"layer {name!r} is a convolution of {layer.groups} groups, each of which sees a part of the patches: "
                f"{way_out}"
            )
    return found


def _named(model: nn.Module, name: str, valid: Sequence[str]) -> nn.Module:
    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    if not isinstance(module, LAYERS):
        raise ValueError(
            f"layers: {name!r} is no Linear, Conv1d, Conv2d or Conv3d of this {type(model).__name__}: "
            f"choose from {list(valid)}"
        )
    return module


def batched(layer: nn.Module, tensor: Tensor) -> Tensor:
    """An input or output of ``layer`` with its samples as first dimension, also where there is only one."""
    least = len(layer.kernel_size) + 2 if isinstance(layer, CONVOLUTIONS) else 2
    return tensor if tensor.dim() >= least else tensor.unsqueeze(0)


def input_rows(layer: nn.Module, inputs: Tensor, *, patches: bool = True) -> Tensor:
    """What multiplies the weights: (N, positions, d), for inputs of N samples.

    Linear: the vectors along the last dimension. Convolutions: the unfolded patches, in the order of the flattened
    weights, or, without ``patches``, the channels at every pixel.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return inputs.unsqueeze(1) if inputs.dim() == 2 else inputs.flatten(1, -2)
    return _patches(layer, inputs) if patches else output_rows(layer, inputs)


def output_rows(layer: nn.Module, outputs: Tensor) -> Tensor:
    """What the weights yield, or its gradient: (N, positions, features), for outputs of N samples."""
    if isinstance(layer, CONVOLUTIONS):
        return outputs.flatten(2).transpose(1, 2)
    return input_rows(layer, outputs)


def _patches(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    inputs = functional.pad(inputs, _padding(layer), mode=mode)
    spatial = len(layer.kernel_size)
    for dim, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        inputs = inputs.unfold(2 + dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # Now (N, channels, positions ..., kernel ...).
    order = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
    return inputs.permute(order).flatten(1 + spatial).flatten(1, spatial)


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """What ``functional.pad`` takes: both ends of the last dimension first."""
    if layer.padding == "valid":
        return [0] * (2 * len(layer.kernel_size))
    if layer.padding == "same":
        reach = [dilation * (size - 1) for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
        ends = [(total // 2, total - total // 2) for total in reach]
    else:
        ends = [(int(width), int(width)) for width in layer.padding]
    return [width for both in reversed(ends) for width in both]


def input_parts(layer: nn.Module, inputs: Tensor, *, patches: bool) -> Iterator[Tensor]:
    """The rows of an input, (samples * positions, d), a part of the samples at a time, for their size in float64."""
    inputs = batched(layer, inputs.detach())
    size = math.prod(layer.kernel_size) if patches and isinstance(layer, CONVOLUTIONS) else 1
    for part in inputs.split(_at_once(inputs, size)):
        yield input_rows(layer, part, patches=patches).flatten(0, 1)


def output_parts(layer: nn.Module, outputs: Tensor) -> Iterator[Tensor]:
    """The rows of an output or its gradient, (samples * positions, features), a part of the samples at a time."""
    outputs = batched(layer, outputs.detach())
    for part in outputs.split(_at_once(outputs, 1)):
        yield output_rows(layer, part).flatten(0, 1)


def _at_once(tensor: Tensor, copies: int) -> int:
    return max(1, PART // max(1, tensor[:1].numel() * copies))
