"""What several test files share: backends, parameters and gradients to run them on, and bit-for-bit comparison."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from layca_fast import FusedLayca, LayerGroups
from layca_fast.backends import load
from layca_fast.commands.cases import BASE_OPTIONS
from layca_fast.formulas.bases import BASES, Base

#: Seconds after which what a test waits for counts as hanging: an hour, however slow or busy the machine.
HANGS = 3600

#: Major and minor number of torch.
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

#: Every backend of this version. None is skipped: the native module is always built for the tests, and Triton's
#: kernels run under its interpreter where there is no GPU. The Triton of torch 2.6 is older than the backend takes, and
#: there is none but for Linux.
HAS_TRITON = TORCH >= (2, 7) and sys.platform.startswith("linux")
BACKENDS = ("torch", "cpu", "triton")[: 3 if HAS_TRITON else 2]

#: An explicit backend that cannot run raises with its reason, so a missing one fails these tests and hides nothing.
every_backend = pytest.mark.parametrize("backend", BACKENDS)

#: For tests that only the host's side of the optimizer decides, and for those too long for the interpreter.
native_backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])


def on_every_backend(name: str, values: Sequence[Any], every: int) -> pytest.MarkDecorator:
    """Every value on every backend; under Triton's interpreter one of ``every``, the others in the exhaustive tests."""
    return pytest.mark.parametrize(
        ("backend", name),
        [
            pytest.param(backend, value, marks=[pytest.mark.exhaustive] * (backend == "triton" and number % every > 0))
            for backend in BACKENDS
            for number, value in enumerate(values)
        ],
        ids=str,
    )


def device_of(backend: str) -> torch.device:
    """The CPU where the backend takes its tensors, else the GPU: Triton runs there unless it is interpreted."""
    cpu = torch.device("cpu")
    return cpu if load(backend).refuses(cpu) is None else torch.device("cuda")


def parameter(*shape: int, backend: str = "torch", dtype: torch.dtype = torch.float32) -> Parameter:
    """A random parameter where ``backend`` takes it."""
    return Parameter(torch.randn(shape, dtype=dtype).to(device_of(backend)))


def directs(base: Mapping[str, Any]) -> bool:
    """Whether a base with these options makes directions of whole matrices."""
    row = BASES[base.get("base", "sgd")]
    return row.formula({**row.options, **base}).direct is not None


def shapes_for(base: Mapping[str, Any], shapes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes, or where the base takes matrices only, with as many dimensions that every slice of them is one."""
    more = 3 if directs(base) else 0
    return [(*shape, *(2,) * (more - len(shape))) for shape in shapes]


def clones(params: Iterable[Tensor]) -> list[Parameter]:
    return [Parameter(param.detach().clone()) for param in params]


def random_gradients(params: Sequence[Tensor], steps: int) -> list[list[Tensor]]:
    """A fresh random gradient for each parameter and step."""
    return [[torch.randn(param.shape, dtype=param.dtype).to(param.device) for param in params] for _ in range(steps)]


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def train(optimizer: Optimizer, gradients: Iterable[Sequence[Tensor | None]]) -> None:
    """One step for each row of gradients (None: that parameter has none); the optimizer sees copies of its own."""
    for row in gradients:
        for param, grad in zip(params_of(optimizer), row, strict=True):
            param.grad = None if grad is None else grad.to(param.dtype, copy=True)
        optimizer.step()


def running(backend: str = "torch", **options: Any) -> FusedLayca:
    """An optimizer in the middle of a run, its parameters named, a gradient ready for the next step."""
    params = [("matrix", parameter(4, 3, backend=backend)), ("bias", parameter(5, backend=backend))]
    optimizer = FusedLayca(params, **{"lr": 0.1, "momentum": 0.9, "backend": backend, **options})
    train(optimizer, random_gradients(params_of(optimizer), 2))
    return optimizer


def mixed_params(backend: str = "torch", dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [parameter(*shape, backend=backend, dtype=dtype) for shape in ((6, 5), (7,), (4, 3, 2), (), (5, 4))]


def mixed_optimizer(params: list[Any], backend: str = "torch") -> FusedLayca:
    """Four groups: three bases, both rules, chunks, a tensor that does not rotate, hyperparameters far from neutral."""
    groups = [
        {"params": params[:1], "chunks": 3, "momentum": 0.8, "nesterov": True},
        {"params": params[1:2], "weight_decay": 0.05, "dampening": 0.3, "lr": 0.02},
        {
            "params": params[2:4],
            "base": "sgd_amom",
            "radius": "current",
            "maximize": True,
            "rotate": True,
            "note": "mine",
        },
        {"params": params[4:], "base": "adam", "betas": (0.8, 0.9), "amsgrad": True, "rule": "hyperball"},
    ]
    return FusedLayca(groups, 0.1, momentum=0.9, backend=backend)


def same_bits(a: Any, b: Any) -> bool:
    """Equal type, shape and bits, NaN and the sign of zero included; mappings and sequences are compared by element."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.dtype, a.shape, a.layout, a.device) != (b.dtype, b.shape, b.layout, b.device):
            return False
        flat = [
            each.detach().to_dense().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
            for each in (a, b)
        ]
        return torch.equal(*flat)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def copy_of(value: Any) -> Any:
    """A copy of tensors in nested lists and dicts, for a later :func:`same_bits`."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copy_of(each) for key, each in value.items()}
    return [copy_of(each) for each in value] if isinstance(value, (list, tuple)) else value


def contents(optimizer: Optimizer) -> list[Any]:
    """Copies of every parameter, gradient and state tensor."""
    return [copy_of([param, param.grad, dict(optimizer.state.get(param, {}))]) for param in params_of(optimizer)]


def norm_of(tensor: Tensor) -> float:
    return float(tensor.detach().double().norm())


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of ``expected``, in float64; infinite or 0 where that norm is 0."""
    ours, theirs = (each.detach().cpu().double() for each in (actual, expected))
    distance, norm = float((ours - theirs).norm()), float(theirs.norm())
    if theirs.numel() == 1:
        # A single number may pass close to zero, where its rounding errors stay those of its former size.
        norm = max(norm, 1.0)
    return distance / norm if norm else math.inf if distance else 0.0


def assert_close(actual: Optimizer, expected: Optimizer, tolerance: float) -> None:
    """Same parameters and state keys, all within ``tolerance`` of the norm of the tensor they belong to."""
    for ours, theirs in zip(params_of(actual), params_of(expected), strict=True):
        assert relative_distance(ours, theirs) <= tolerance
        state, other = actual.state[ours], expected.state[theirs]
        assert set(state) == set(other)
        for name in other:
            assert relative_distance(state[name], other[name]) <= tolerance, name


def turning(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Names of the tensors that rotate, in the order of the groups, with their chunks."""
    return {name: group["chunks"] for group in groups if group["rotate"] for name, _ in group["params"]}


def resting(groups: LayerGroups) -> dict[str, str]:
    """Names of the tensors that do not rotate, with the reason that the plan gives."""
    named = {name for group in groups if not group["rotate"] for name, _ in group["params"]}
    reasons = {row.name: row.reason for row in groups.rows if row.lr_factor is None}
    assert named == set(reasons)
    return reasons


class Unknown(nn.Module):
    """A type that torch does not know, with weights as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.scale = nn.Parameter(torch.randn(()))
        self.gain = nn.Parameter(torch.randn(6))
        self.bias = nn.Parameter(torch.randn(1, 6))


def rows_by_formula(**more: Any) -> dict[str, tuple[Base, dict[str, Any]]]:
    """For each formula a base with a complete param group, its options away from their defaults, that runs it."""
    rows = {}
    for options in BASE_OPTIONS:
        optimizer = FusedLayca([torch.ones(1, 1, requires_grad=True)], **options, **more)
        (group,) = optimizer.param_groups
        base = BASES[group["base"]]
        rows[base.formula(group).name] = base, group
    return rows
