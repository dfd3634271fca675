"""What ``verify`` runs, and the tests with it: every base, rule and type, on tensors of odd shapes."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..formulas.bases import Formula
from ..formulas.options import find_base
from ..state.compensation import HALVES
from ..state.cut import cut_shape

Shape = tuple[int, ...]

ODD_SHAPES: tuple[Shape, ...] = ((17, 31), (64, 129), (8, 3, 3, 3), (1, 1), (2, 1), (33,), (), (4, 0), (130, 65))


@dataclass(frozen=True)
class Case:
    """What one row of the table runs: tensors of ``shapes`` under ``options`` of FusedLayca, for ``steps`` steps.

    Of 16-bit types what is compared is the weight that the parameter and its remainder stand for.

    ``turned``: the weights lie in memory with their first two dimensions swapped, as every backend can walk columns.
    ``sine``: of the angle between weights and gradient of the layers that rotate; None for random directions.
    """

    name: str
    shapes: tuple[Shape, ...] = ODD_SHAPES
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    steps: int = 50
    lr: float = 0.05
    sine: float | None = None
    turned: bool = False


BASE_OPTIONS: tuple[Mapping[str, Any], ...] = (
    {"base": "sgd"},
    {"base": "sgd", "momentum": 0.9},
    {"base": "sgd", "momentum": 0.8, "dampening": 0.3},
    {"base": "sgd", "momentum": 0.9, "nesterov": True},
    {"base": "sgd_amom", "momentum": 0.95},
    {"base": "rmsprop", "alpha": 0.9, "eps": 1e-3},
    {"base": "rmsprop", "alpha": 0.8, "eps": 1e-2, "centered": True},
    {"base": "rmsprop", "alpha": 0.9, "eps": 1e-3, "momentum": 0.7},
    {"base": "rmsprop", "alpha": 0.8, "eps": 1e-2, "centered": True, "momentum": 0.6},
    {"base": "adagrad", "eps": 1e-3, "initial_accumulator_value": 0.1},
    {"base": "adam", "betas": (0.8, 0.95), "eps": 1e-3},
    {"base": "adam", "betas": (0.7, 0.9), "eps": 1e-2, "amsgrad": True},
    {"base": "lion", "betas": (0.8, 0.95)},
    # Rounding errors of the other types grow in the iterations, and on GPUs the default is bfloat16.
    {"base": "muon", "momentum": 0.9, "ns_dtype": torch.float64},
    {
        "base": "muon",
        "momentum": 0.8,
        "nesterov": False,
        "ns_steps": 3,
        "ns_coefficients": (3.0, -3.2, 1.2),
        "adjust_lr": "match_rms_adamw",
        "ns_dtype": torch.float64,
    },
)


def shapes_of(options: Mapping[str, Any], shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Those of ``shapes`` that a base with these options takes."""
    base = find_base(options.get("base", "sgd"))
    directs = base.formula({**base.options, **options}).direct is not None
    if not directs:
        return shapes
    chunks = options.get("chunks", 1)
    return tuple(shape for shape in shapes if len(cut_shape(shape, chunks).layer_shape()) >= 2)


def describe_base(options: Mapping[str, Any]) -> tuple[str, Formula]:
    """What to call a base with these options, and the formula that it then runs."""
    base = find_base(options["base"])
    formula = base.formula({**base.options, **options})
    return formula.name if formula.name.startswith(base.name) else f"{base.name} ({formula.name})", formula


@dataclass(frozen=True)
class Effort:
    """How long a case runs: steps of the odd shapes, the number of small tensors, the shape of the large one."""

    steps: int
    many: int
    large: Shape


QUICK, DEFAULT, FULL = "quick", "default", "full"

#: Interpreted kernels take milliseconds per tile, and torch's on a GPU dozens of launches per tensor.
EFFORTS: Mapping[str, Mapping[str, Effort]] = {
    QUICK: {"here": Effort(3, 100, (300, 333)), "interpreted": Effort(2, 5, (100, 111))},
    DEFAULT: {"here": Effort(15, 300, (1024, 1025)), "interpreted": Effort(5, 20, (300, 333))},
    FULL: {"here": Effort(50, 1000, (1024, 4099)), "interpreted": Effort(10, 20, (300, 333))},
}
MOST_LAUNCHED = 300


def interpreting() -> bool:
    """Whether Triton's kernels run under its interpreter: always where there is no GPU for them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def effort_of(how: str, name: str, device: torch.device) -> Effort:
    """What a backend is given to do on a device."""
    effort = EFFORTS[how]["interpreted" if name == "triton" and interpreting() else "here"]
    many = min(effort.many, MOST_LAUNCHED) if name == "torch" and device.type == "cuda" else effort.many
    return replace(effort, many=many)


def cases(effort: Effort) -> Iterator[Case]:
    """The rows of the table."""
    steps = effort.steps
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for options in BASE_OPTIONS:
            name, _ = describe_base(options)
            shapes = shapes_of(options, ODD_SHAPES)
            yield Case(name, shapes, options, dtype, steps)
            # The rule is made of float64 numbers, which know nothing of 16 bits.
            if dtype not in HALVES:
                yield Case(f"{name}, hyperball", shapes, {**options, "rule": "hyperball"}, dtype, steps)
        momentum = {"base": "sgd", "momentum": 0.9}
        slices = {**momentum, "chunks": "all", "radius": "current", "maximize": True}
        yield Case("chunks=all, radius=current", ((12, 30), (5, 4, 7)), slices, dtype, steps)
        yield Case("chunks=(9, 2, 1)", ((12, 30), (12, 4, 7)), {**momentum, "chunks": (9, 2, 1)}, dtype, steps)
        experts = {**momentum, "chunks": ("matrices", 2)}
        yield Case("chunks=('matrices', 2)", ((2, 3, 4, 7), (5, 6, 20)), experts, dtype, steps)
        columns = {**momentum, "chunks": "columns"}
        yield Case("chunks=columns", ((12, 30), (5, 4, 3, 3)), columns, dtype, steps, turned=True)
        adam = {"base": "adam", "betas": (0.8, 0.95), "eps": 1e-3}
        learned = {**adam, "radius": "learned", "radius_lr": 2.0, "chunks": "all"}
        yield Case("radius=learned", ((12, 30), (5, 4, 7)), learned, dtype, steps)
        tilted = {**momentum, "radius": "learned", "maximize": True}
        yield Case("radius=learned, maximize", ((40, 30), (2, 1)), tilted, dtype, steps)
        yield Case("radius=2.5", ((12, 30), (5, 4, 7)), {**momentum, "radius": 2.5, "chunks": "all"}, dtype, steps)
        plain = {**momentum, "rotate": False, "weight_decay": 0.1}
        yield Case("no rotation, weight decay", ODD_SHAPES, plain, dtype, steps)
        if dtype not in (torch.float32, torch.bfloat16):
            # How many tensors and how large they are, kernels are told alike in every type.
            continue
        small = ((10, 10),) * effort.many
        yield Case(f"{len(small)} small tensors", small, momentum, dtype, min(steps, 10))
        yield Case(f"{math.prod(effort.large) / 1e6:.2f} M weights", (effort.large,), momentum, dtype, min(steps, 5))
    for sine in (1e-1, 1e-3, 1e-5):
        yield Case(f"sin(w, u) = {sine:g}", ((100, 100),), {}, steps=5, sine=sine)
