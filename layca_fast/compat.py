"""What this package takes from torch that is private, or younger than the oldest torch it runs on.

A torch that moved one of these is mended here. Elsewhere stand only the names of an optimizer's dicts of hooks
(``_optimizer_step_pre_hooks`` and their like), by which ``attach`` works. ``SINCE`` has the version that each came in;
the tests look for all of them in the torch that is there, and ``make test-versions`` runs them in several.
"""

import sys
from collections.abc import Callable, Iterable
from functools import wraps
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

#: Names below torch, with the first version that has them. 2.6, the oldest that pyproject.toml admits, also stands for
#: older ones.
SINCE = {
    "_C._current_graph_task_id": (2, 6),
    "_C._get_dispatch_mode": (2, 6),
    "_C._len_torch_dispatch_stack": (2, 6),
    "_C._len_torch_function_stack": (2, 6),
    "_C._set_grad_enabled": (2, 6),
    "_C._TorchDispatchModeKey": (2, 6),
    "_compile._disable_dynamo": (2, 6),
    "_subclasses.fake_tensor.FakeTensor": (2, 6),
    "distributed.tensor._utils.compute_local_shape_and_global_offset": (2, 6),
    "distributed.tensor.placement_types._StridedShard": (2, 6),
    "distributed.tensor.DTensor._local_tensor": (2, 6),
    "distributed.tensor.DTensor._spec": (2, 6),
    "overrides._get_current_function_mode_stack": (2, 6),
    "utils._device.DeviceContext": (2, 6),
    # Named by tests and benchmarks only; its steps and checkpoints are those of base="muon".
    "optim.Muon": (2, 9),
    "Tensor.__dlpack_c_exchange_api__": (2, 10),
    "Tensor._version": (2, 6),
    "Tensor.grad_dtype": (2, 10),
}

Function = TypeVar("Function", bound=Callable[..., Any])

#: torch's description of tensors in C, DLPack's exchange API; None before 2.10.
EXCHANGE_API = getattr(Tensor, "__dlpack_c_exchange_api__", None)

#: Whether a gradient may be of another type than its tensor, by ``Tensor.grad_dtype``.
GRADIENTS_HAVE_TYPES = hasattr(Tensor, "grad_dtype")

#: Of a DTensor: the tensor of this process inside, and how it is shared out.
local_tensor, spec_of = attrgetter("_local_tensor"), attrgetter("_spec")


def not_compiled(function: Function) -> Function:
    """Let torch.compile leave the calls of a function as they are.

    ``torch.compiler.disable`` does the same, but imports all of torch's compiler, which takes a second.
    """
    return cast(Function, _disable_dynamo(function))


def without_gradients(function: Function) -> Function:
    """As ``torch.no_grad()`` decorates a function, by a fifth of its calls."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        before = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return cast(Function, called)


def modes_are_on() -> bool:
    """Whether a mode may see what is done to tensors: a dispatch mode, or one of :func:`function_modes`."""
    return torch._C._len_torch_dispatch_stack() > 0 or (
        torch._C._len_torch_function_stack() > 0 and any(True for _ in function_modes())
    )


def function_modes() -> Iterable[Any]:
    """The modes that see calls of torch's functions, less that of a default device, which looks at new tensors only."""
    if torch._C._len_torch_function_stack() == 0:
        return ()
    return (mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext))


def tracing_modes() -> Iterable[Any]:
    """The modes that are on which pretend, record or rewrite what is done to tensors: none in an ordinary program."""
    keys = torch._C._TorchDispatchModeKey
    modes = (torch._C._get_dispatch_mode(key) for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))
    return (mode for mode in modes if mode is not None)


def number_of_backward() -> int:
    """Which backward pass runs on this thread; -1 outside of any."""
    return int(torch._C._current_graph_task_id())


def is_fake(tensor: Tensor) -> bool:
    """Whether it has a shape and a type and no numbers, as FakeTensorMode makes them to try a program out."""
    # Imported by torch itself, in the versions that do; a fake tensor cannot be there before it.
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def version_of(tensor: Tensor) -> int:
    """How often autograd has been told of a write to it; 0 for one of inference mode, of which it keeps no count."""
    return 0 if tensor.is_inference() else int(tensor._version)


def is_fsdp1(tensor: Tensor) -> bool:
    """Whether it is, or lies in, a flat parameter of the first FSDP."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def shard_offsets(tensor: "DTensor") -> tuple[int, ...]:
    """Where in the global tensor the local one begins, in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def split_factor(placement: "Placement") -> int:
    """Of how many runs a process has one part each: 1 under Shard, more under _StridedShard."""
    return int(getattr(placement, "split_factor", 1))
