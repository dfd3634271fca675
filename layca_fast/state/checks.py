"""What tensors FusedLayca accepts. Each check raises an error that names the tensor and the way out."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import is_fake, is_fsdp1
from ..formulas.chunks import Chunks
from ..formulas.options import find_base
from ..messages import describe, labelled
from .cut import Cut, check_names, cut_of
from .layout import bytes_needed, overlaps
from .sharding import check_placements, check_same_mesh, is_sharded, local_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


#: What in DeepSpeed takes steps on flat runs of many layers.
FLATTENING = ("deepspeed.runtime.zero", "deepspeed.runtime.bf16_optimizer", "deepspeed.runtime.fp16.fused_optimizer")


class SparseGradientError(TypeError, RuntimeError):
    """A gradient of a layout that no kernel walks; torch's optimizers raise RuntimeError for it."""


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the numbers are in another tensor inside this one, as in DTensor."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_not_flattened() -> None:
    """Raise TypeError where DeepSpeed takes the step: flat runs of many layers stand in place of the parameters."""
    frame = sys._getframe() if "deepspeed" in sys.modules else None
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(FLATTENING):
            raise TypeError(
                f"this step was taken by {name}, which gives the optimizer flat runs of many layers instead of the "
                "parameters, so there are no layers to turn: shard the model with FSDP2 "
                "(torch.distributed.fsdp.fully_shard), or train float32 weights with ZeRO stage 0"
            )
        frame = frame.f_back


def check_initialized(tensor: Tensor, label: str) -> None:
    """Raise ValueError for the parameter of a lazy module that has seen no input yet."""
    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError(f"{label} is not initialized yet: run one forward pass before making the optimizer")


def check_parameter(tensor: Tensor, label: str) -> None:
    """Raise TypeError or ValueError for a tensor that no kernel may be handed."""
    check_initialized(tensor, label)
    name = describe(label, tensor)
    if is_fsdp1(tensor):
        raise TypeError(
            f"{name} is a part of an FSDP1 flat parameter, which knows no layers and so no norms of theirs, with "
            "use_orig_params=True neither: shard the model with FSDP2, torch.distributed.fsdp.fully_shard"
        )
    check_placements(tensor, name)
    tensor = local_of(tensor)
    if is_wrapper(tensor) and not is_fake(tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}: layca_fast reads plain tensors and DTensors only; pass the plain "
            "tensor inside it"
        )
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name} has layout {tensor.layout}: make a dense parameter of it, "
            "torch.nn.Parameter(parameter.detach().to_dense())"
        )
    if tensor.is_quantized or not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(
            f"{name} is not a floating-point tensor: leave it out, or convert it, "
            "torch.nn.Parameter(parameter.float()), or parameter.dequantize() of a quantized one"
        )
    if tensor.is_complex():
        raise TypeError(
            f"{name} is complex: make its real form the parameter, torch.nn.Parameter(torch.view_as_real(parameter."
            "detach().resolve_conj())), and use torch.view_as_complex(parameter) in the forward pass"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name}: only float64, float32, bfloat16 and float16 parameters can be trained; keep the parameters in "
            f"one of these, and convert them to {tensor.dtype} in the forward pass"
        )
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device: materialize it first, with module.to_empty(device=...)")
    if tensor.is_neg():
        raise ValueError(
            f"{name} is a lazily negated view: make a parameter with memory of its own, "
            "torch.nn.Parameter(parameter.detach().resolve_neg())"
        )
    if overlaps(tensor):
        raise ValueError(
            f"{name} has elements that share memory (strides {tensor.stride()}), as expanded tensors do: "
            "make a parameter with memory of its own, torch.nn.Parameter(parameter.detach().clone()), or make the "
            "tensor before the expansion the parameter and expand it in the forward pass"
        )


def check_writable(tensor: Tensor, label: str) -> None:
    """Raise ValueError for a tensor that was made in inference mode, and is not to be written to outside of it."""
    if local_of(tensor).is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{describe(label, tensor)} was made under torch.inference_mode(), and such a tensor cannot be trained: "
            "pass a copy that is made outside of it, torch.nn.Parameter(parameter.clone())"
        )


def check_memory(tensor: Tensor, label: str) -> None:
    """Raise ValueError for a tensor whose memory was freed, in part or whole, as sharded training does between uses."""
    local = local_of(tensor)
    if local.numel() > 0 and local.untyped_storage().nbytes() < bytes_needed(local):
        raise ValueError(f"the memory of {describe(label, tensor)} was freed: step while it is there")


def check_gradient(grad: Tensor, param: Tensor, label: str) -> None:
    """Raise TypeError or ValueError for a gradient that does not fit its parameter."""
    name = describe(f"the gradient of {label}", grad)
    check_same_mesh(grad, param, name)
    moves = is_sharded(grad) and is_sharded(param) and grad.placements != param.placements
    grad, param = local_of(grad), local_of(param)
    if grad.layout != torch.strided:
        raise SparseGradientError(f"{name} has layout {grad.layout}: FusedLayca needs dense gradients (sparse=False)")
    if is_wrapper(grad) and not (is_fake(grad) and is_fake(param)):
        raise TypeError(f"{name} is a {type(grad).__name__}: FusedLayca reads plain tensors only")
    check_memory(grad, f"the gradient of {label}")
    if not grad.is_floating_point():
        raise TypeError(f"{name} is no floating-point tensor: its parameter is {param.dtype}")
    # Those that are redistributed have the shape of their parameter only then.
    for what in ("device",) if moves else ("shape", "device"):
        theirs, ours = getattr(grad, what), getattr(param, what)
        if theirs != ours:
            raise ValueError(f"{name} has {what} {theirs}, its parameter {ours}: they must be the same")


def check_new(group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError, naming it, for a parameter of ``group`` that is there twice or in one of ``groups`` already."""
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    seen = {id(param): label for _, label, param in labelled(groups)}
    for index, entry in enumerate(params):
        name, param = entry if isinstance(entry, tuple) else (None, entry)
        label = f"parameter {index} of group {len(groups)}" if name is None else f"parameter {name!r}"
        if id(param) in seen:
            raise ValueError(
                f"{label} is the same tensor as {seen[id(param)]}: pass each parameter once, tied weights under one of "
                "their names"
            )
        seen[id(param)] = label


def count_layers(param: Tensor, chunks: Chunks, label: str) -> int:
    """How many layers a rotating tensor holds; ValueError where ``chunks`` does not fit its shape."""
    return cut_of(param, chunks, label).layers


def cut_for(param: Tensor, group: Mapping[str, Any], label: str) -> Cut:
    """How the chunks of its group cut a tensor; ValueError where they, or names for them, do not fit its shape."""
    cut = cut_of(param, group["chunks"], label)
    names = group.get("chunk_names")
    if names is not None:
        check_names(cut, names, describe(label, param))
    return cut


def check_matrices(param: Tensor, group: Mapping[str, Any], label: str) -> None:
    """Raise ValueError where a layer of ``param`` is no matrix and the base of its group directs matrices only.

    Or where ``chunks`` does not divide it.
    """
    base = find_base(group["base"])
    if base.formula(group).direct is None:
        return
    chunks = group["chunks"]
    if param.dim() < 2:
        raise ValueError(
            f"{describe(label, param)} is no matrix, and base={base.name!r} directs whole matrices: put it in a group "
            f"with another base, as layer_groups(model, base={base.name!r}, others_base='adam') does"
        )
    cut = cut_of(param, chunks, label)
    if len(cut.layer_shape()) < 2 or (cut.turned and cut.stack > 0):
        raise ValueError(
            f"chunks={chunks!r} cuts {describe(label, param)} into vectors, and base={base.name!r} directs whole "
            "matrices: choose fewer chunks, or another base for its group"
        )
