"""How a tensor lies in memory: what the kernels may walk as one run of addresses, and where its scalars live."""

from typing import Any

import torch
from torch import Tensor


def _dims(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions longer than 1, innermost first."""
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    return sorted((stride, size) for stride, size in dims if size != 1)


def is_vector(tensor: Tensor) -> bool:
    """Whether at most one dimension is longer than 1: rows, columns and numbers, however many dimensions they have."""
    return sum(size != 1 for size in tensor.shape) < 2


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory without gaps or overlaps, in whatever order of dimensions."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in _dims(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def bytes_needed(tensor: Tensor) -> int:
    """How many bytes its storage must have for all elements of a tensor, of which there is one at least."""
    reach = sum(stride * (size - 1) for stride, size in _dims(tensor))
    return int((tensor.storage_offset() + reach + 1) * tensor.element_size())


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share an address, as in expanded tensors.

    Strides that interleave without touching (made by ``as_strided`` only) are reported as overlapping, too.
    """
    if tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in _dims(tensor):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def usable(state: Any) -> Any:
    """A state in which single elements can be written, at any time: itself, or a copy of one that is expanded."""
    if not isinstance(state, Tensor) or state.layout != torch.strided:
        return state
    if overlaps(state) or (state.is_inference() and not torch.is_inference_mode_enabled()):
        return state.clone(memory_format=torch.contiguous_format)
    return state


def layers_are_dense(tensor: Tensor, layers: int) -> bool:
    """Whether each row of ``tensor.reshape(layers, -1)``, in any order, is one run of memory, one after the other."""
    if not is_dense(tensor):
        return False
    rest = tensor.numel()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if layers == 1 or rest == 0:
            break
        if size == 1:
            continue
        # Dimensions that layers are counted along must be the outermost in memory, in their order.
        if stride * size != rest:
            return False
        rest, layers = rest // size, max(layers // size, 1)
    return True


def memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor as a flat view, in the order in which its elements lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def scalar_device(device: torch.device) -> torch.device:
    """Where the float64 dots and coefficients of tensors on ``device`` live: MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
