"""What FusedLayca accepts. Each check raises an error that names the parameter, the value and the way out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..backends.names import MODULES
from ..state.layout import overlaps
from ..state.sharding import check_placements, check_same_mesh, is_sharded, local_of
from .base_steps import RULES
from .bases import BASES, Base

RADII = ("initial", "current")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATE_DTYPES = (None, torch.bfloat16, torch.float32)

#: What every group holds whatever its base is.
COMMON_OPTIONS = (
    *("lr", "base", "rule", "rotate", "chunks", "radius", "weight_decay", "maximize"),
    *("compensate", "state_dtype", "capturable", "backend"),
)


def labelled(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], str, Tensor]]:
    """Every parameter with its group and what to call it in a message: its name, if the group knows it."""
    for number, group in enumerate(groups):
        names = group.get("param_names") or ()
        for index, param in enumerate(group["params"]):
            # Someone may have appended to the parameters of a group with names.
            label = f"parameter {names[index]!r}" if index < len(names) else f"parameter {index} of group {number}"
            yield group, label, param


def named(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], str, Tensor]]:
    """Every parameter with its group and its name: "group.index", their numbers, where the group does not know one."""
    for number, group in enumerate(groups):
        names = group.get("param_names") or ()
        for index, param in enumerate(group["params"]):
            yield group, names[index] if index < len(names) else f"{number}.{index}", param


def describe(label: str, tensor: Tensor) -> str:
    """A parameter in an error message: its label, shape and dtype."""
    return f"{label} (shape {tuple(tensor.shape)}, {tensor.dtype})"


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the numbers are in another tensor inside this one, as in DTensor."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_initialized(tensor: Tensor, label: str) -> None:
    """Raise ValueError for the parameter of a lazy module that has seen no input yet."""
    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError(f"{label} is not initialized yet: run one forward pass before making the optimizer")


def check_parameter(tensor: Tensor, label: str) -> None:
    """Raise TypeError or ValueError for a tensor that no kernel may be handed."""
    check_initialized(tensor, label)
    name = describe(label, tensor)
    if getattr(tensor, "_fsdp_flattened", False):
        raise TypeError(
            f"{name} is a part of an FSDP1 flat parameter, which knows no layers and so no norms of theirs, with "
            "use_orig_params=True neither: shard the model with FSDP2, torch.distributed.fsdp.fully_shard"
        )
    check_placements(tensor, name)
    tensor = local_of(tensor)
    if is_wrapper(tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}: layca_fast reads plain tensors and DTensors only; pass the plain "
            "tensor inside it"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}: pass a dense tensor, parameter.to_dense()")
    if tensor.is_quantized or not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"{name} is not a floating-point tensor: leave it out, or convert it to float32")
    if tensor.is_complex():
        raise TypeError(f"{name} is complex: pass torch.view_as_real(parameter) as the parameter instead")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name}: only float64, float32, bfloat16 and float16 parameters can be trained; keep the parameters in "
            f"one of these, and convert them to {tensor.dtype} in the forward pass"
        )
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device: materialize it first, with module.to_empty(device=...)")
    if tensor.is_neg():
        raise ValueError(f"{name} is a lazily negated view: pass parameter.resolve_neg() as the parameter")
    if overlaps(tensor):
        raise ValueError(
            f"{name} has elements that share memory (strides {tensor.stride()}), as expanded tensors do: "
            "pass parameter.clone() as the parameter"
        )


def check_memory(tensor: Tensor, label: str) -> None:
    """Raise ValueError for a tensor that has elements and no memory, as sharded training leaves it between uses."""
    local = local_of(tensor)
    if local.numel() > 0 and local.untyped_storage().nbytes() == 0:
        raise ValueError(f"the memory of {describe(label, tensor)} was freed: step while it is there")


def check_gradient(grad: Tensor, param: Tensor, label: str) -> None:
    """Raise TypeError or ValueError for a gradient that does not fit its parameter."""
    name = describe(f"the gradient of {label}", grad)
    check_same_mesh(grad, param, name)
    moves = is_sharded(grad) and is_sharded(param) and grad.placements != param.placements
    grad, param = local_of(grad), local_of(param)
    if grad.layout != torch.strided:
        raise TypeError(f"{name} has layout {grad.layout}: FusedLayca needs dense gradients (sparse=False)")
    if is_wrapper(grad):
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


def misspelt(group: Mapping[str, Any], others: Sequence[str] = ()) -> str | None:
    """What to warn of, if a key of a param group is next to one that is read; other keys are the user's own.

    ``others``: more names that are read.
    """
    known = [*COMMON_OPTIONS, "lr_factor", *others, *(name for base in BASES.values() for name in base.options)]
    for key in group:
        # OneCycleLR's "max_momentum" is further from "momentum" than this.
        close = [] if key in known else get_close_matches(str(key), known, n=1, cutoff=0.85)
        if close:
            return f"{key}={group[key]!r} is kept in the param group, but nothing reads it: did you mean {close[0]!r}?"
    return None


def check_lr(lr: Any, name: str = "lr") -> None:
    """Raise for a learning rate that is no finite number >= 0. One that lives on a device is not read back."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{name} is a tensor of shape {tuple(lr.shape)}: it must hold one number")
        if lr.device.type != "cpu":
            return
    elif not isinstance(lr, Real):
        raise TypeError(f"{name}={lr!r}: must be a number, or a tensor that holds one")
    if not (0.0 <= float(lr) < math.inf):
        raise ValueError(f"{name}={lr!r}: must be finite and >= 0 (each step turns a layer by atan(lr) radians)")


def check_choice(group: Mapping[str, Any], name: str, choices: tuple[Any, ...]) -> None:
    """Raise ValueError if the option ``name`` of ``group`` is none of ``choices``."""
    if group[name] not in choices:
        raise ValueError(f"{name}={group[name]!r} is unknown: choose one of {list(choices)}")


def check_chunks(chunks: Any) -> None:
    """Raise ValueError for a number of layers per tensor that is none."""
    if chunks != "all" and (isinstance(chunks, bool) or not isinstance(chunks, Integral) or chunks < 1):
        raise ValueError(f"chunks={chunks!r}: must be a whole number >= 1, or 'all' (one layer per slice)")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise for hyperparameters of a param group that are unknown or out of range."""
    check_lr(group["lr"])
    base = find_base(group["base"])
    lacking = [name for name in base.options if name not in group]
    if lacking:
        raise ValueError(f"base={base.name!r} needs {lacking}, which its param group lacks: set them in the group")
    base.check(group)
    check_choice(group, "rule", tuple(RULES))
    check_choice(group, "radius", RADII)
    check_choice(group, "backend", ("auto", *MODULES))
    check_choice(group, "maximize", (False, True))
    check_choice(group, "state_dtype", STATE_DTYPES)
    if not any(group["compensate"] is each for each in (None, True, False)):
        raise ValueError(
            f"compensate={group['compensate']!r}: must be True or False (whether 16-bit parameters keep the rest of "
            "their bits), or None (they do)"
        )
    check_choice(group, "capturable", (False, True))
    if group["rotate"] not in (None, True, False):
        raise ValueError(f"rotate={group['rotate']!r}: must be True, False, or None (tensors of 2 or more dimensions)")
    check_chunks(group["chunks"])
    decay = group["weight_decay"]
    if not isinstance(decay, Real) or not (0.0 <= float(decay) < math.inf):
        raise ValueError(f"weight_decay={decay!r}: must be a finite number >= 0")


def find_base(name: Any) -> Base:
    """The base optimizer called ``name``; ValueError with the valid names if there is none."""
    if not isinstance(name, str) or name not in BASES:
        raise ValueError(f"base={name!r} is unknown: choose one of {sorted(BASES)}")
    return BASES[name]


def check_options(base: Base, given: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword that ``base`` does not have."""
    for name in given:
        if name not in base.options:
            others = sorted(each.name for each in BASES.values() if name in each.options)
            owner = f" (it belongs to {', '.join(others)})" if others else ""
            raise TypeError(
                f"{name}={given[name]!r} is no option of base={base.name!r}{owner}: it has {sorted(base.options)}, "
                "beside those of every base (lr, rotate, chunks, rule, radius, weight_decay, ...)"
            )


def count_layers(param: Tensor, chunks: int | str, label: str) -> int:
    """How many layers a rotating tensor holds; ValueError where ``chunks`` does not divide its first dimension."""
    if chunks == 1:
        return 1
    rows = param.shape[0] if param.dim() > 0 else 1
    if chunks == "all":
        return max(rows, 1)
    if rows % int(chunks) != 0:
        raise ValueError(
            f"chunks={chunks!r} does not divide the first dimension of {describe(label, param)}: choose a divisor of "
            f"{rows}, or put the tensor in a group with chunks=1"
        )
    return int(chunks)
