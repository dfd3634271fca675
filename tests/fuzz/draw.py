"""What a trial starts from: random tensors in random memory layouts, and param groups under random options."""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast.formulas.bases import BASES, FORMULAS
from layca_fast.formulas.options import find_base
from layca_fast.state.checks import check_matrices
from layca_fast.state.compensation import HALVES

DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Lengths around those that the kernels cut at: blocks, tiles, pieces that threads share.
LARGE = (1025, 4097, 70_001)

LAYOUTS = ("plain", "plain", "plain", "transposed", "channels_last", "strided")


@dataclass
class Draw:
    """The random numbers of one trial: choices, and tensors from them. The same seed and number, the same trial."""

    seed: int
    number: int
    #: Whether momentum may be dampened.
    dampens: bool = True
    #: The names of those that the base steps are drawn of.
    formulas: Collection[str] = tuple(FORMULAS)
    choose: random.Random = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.choose = random.Random(f"{self.seed}/{self.number}")
        self.generator = torch.Generator().manual_seed(self.choose.getrandbits(60))

    @property
    def directs(self) -> bool:
        """Whether all that may be drawn takes whole matrices."""
        return all(FORMULAS[name].direct is not None for name in self.formulas)

    def chance(self, probability: float) -> bool:
        return self.choose.random() < probability

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)


def draw_shape(draw: Draw) -> tuple[int, ...]:
    dims = draw.choose.choice((2, 2, 3, 4) if draw.directs else (0, 1, 1, 2, 2, 2, 2, 3, 4))
    shape = [draw.choose.choice((1, 2, 3, 4, 5, 7)) for _ in range(dims)]
    if dims and draw.chance(0.03):
        shape[draw.choose.randrange(dims)] = 0
    elif dims and draw.chance(0.02):
        shape = [1] * dims
        shape[-1] = draw.choose.choice(LARGE)
    return tuple(shape)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A copy of the tensor in memory of its own, laid out as ``layout`` says where it has the dimensions for it."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.clone(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and tensor.dim() >= 1:
        memory = torch.zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=tensor.dtype)
        view = memory[..., ::2]
        return view.copy_(tensor)
    return tensor.clone(memory_format=torch.contiguous_format)


def draw_parameter(draw: Draw) -> Parameter:
    dtype = draw.choose.choice(DTYPES)
    scale = draw.choose.choice((0.03, 1.0, 1.0) if dtype in HALVES else (1e-3, 1.0, 1.0, 1e3))
    value = draw.normal(draw_shape(draw)).mul_(scale).to(dtype)
    # A layer of zeros has no direction to turn, and is refused.
    value = torch.where(value == 0, torch.full_like(value, scale), value)
    return Parameter(laid_out(value, draw.choose.choice(LAYOUTS)))


def draw_base(draw: Draw, params: Sequence[Parameter], chunks: Any) -> dict[str, Any]:
    """A base with its own options, which takes these tensors cut in this way."""
    while True:
        options = _draw_any_base(draw)
        group = {**BASES[options["base"]].options, **options, "chunks": chunks}
        if find_base(group["base"]).formula(group).name in draw.formulas and _all_fit(params, group):
            return options


def _all_fit(params: Sequence[Parameter], group: Mapping[str, Any]) -> bool:
    try:
        for param in params:
            check_matrices(param, group, "")
    except ValueError:
        return False
    return True


def _draw_any_base(draw: Draw) -> dict[str, Any]:
    choice = draw.choose.choice
    base = choice(list(BASES))
    if base == "sgd":
        dampening = choice((0.0, 0.0, 0.3))
        options = {"momentum": choice((0.0, 0.5, 0.9)), "dampening": dampening if draw.dampens else 0.0}
        if options["momentum"] and not options["dampening"]:
            options["nesterov"] = choice((False, True))
    elif base == "sgd_amom":
        options = {"momentum": choice((0.0, 0.5, 0.95))}
    elif base == "rmsprop":
        options = {"alpha": choice((0.5, 0.99)), "eps": choice((1e-8, 1e-3)), "momentum": choice((0.0, 0.7))}
        options["centered"] = choice((False, True))
    elif base == "adagrad":
        options = {"eps": choice((1e-10, 1e-3)), "initial_accumulator_value": choice((0.0, 0.1))}
    elif base == "adam":
        options = {"betas": choice(((0.9, 0.999), (0.5, 0.8), (0.0, 0.9), (0.9, 0.0))), "eps": choice((1e-8, 1e-3))}
        options["amsgrad"] = choice((False, True))
    elif base == "muon":
        options = {"momentum": choice((0.0, 0.5, 0.95)), "nesterov": choice((False, True)), "eps": choice((1e-7, 1e-3))}
        options |= {"ns_steps": choice((1, 3, 5)), "ns_dtype": choice((None, torch.float64))}
        options["adjust_lr"] = choice((None, "original", "match_rms_adamw"))
    else:
        options = {"betas": choice(((0.9, 0.99), (0.5, 0.3)))}
    return {"base": base, **options}


def draw_rate(draw: Draw) -> float:
    return draw.choose.choice((0.0, 1e-6, 1e-3, 0.01, 0.05, 0.3, 2.0))


def _other_forms(draw: Draw, params: list[Parameter]) -> list[Any]:
    """Forms of chunks that are no equal slices, of those that these tensors take."""
    found: list[Any] = ["matrices"] if all(param.numel() > 0 for param in params) else []
    rows = {len(param) for param in params if param.dim() > 0}
    if len(rows) == 1 and max(rows) > 1 and all(param.dim() > 0 for param in params):
        first = draw.choose.randrange(1, max(rows))
        found.append((first, max(rows) - first))
    if all(param.dim() > 1 and param.numel() > 0 for param in params):
        found.append("columns")
    return found


def draw_options(draw: Draw, params: list[Parameter]) -> dict[str, Any]:
    """The options of a param group for these tensors."""
    choice = draw.choose.choice
    divisors = [n for n in (2, 3, 7) if all(param.dim() > 0 and len(param) % n == 0 for param in params)]
    chunks = 1 if draw.directs else choice((1, 1, "all", *divisors, *_other_forms(draw, params)))
    radius = choice(("initial", "initial", "initial", "current", "current", 2.5))
    return {
        **draw_base(draw, params, chunks),
        "lr": draw_rate(draw),
        "rule": choice(("layca", "layca", "hyperball")),
        "rotate": choice((None, None, None, True, False)),
        "chunks": chunks,
        "radius": radius,
        "joins_at": choice((0.0, 0.0, 1.5)) if isinstance(radius, str) else 0.0,
        "weight_decay": choice((0.0, 0.0, 0.1)),
        "maximize": choice((False, False, True)),
        "compensate": choice((None, None, True, False)),
        "state_dtype": choice((None, None, torch.bfloat16)),
    }


def draw_groups(draw: Draw) -> list[dict[str, Any]]:
    groups = []
    for _ in range(draw.choose.choice((1, 1, 1, 2))):
        params = [draw_parameter(draw) for _ in range(draw.choose.choice((1, 1, 1, 2)))]
        groups.append({"params": params, **draw_options(draw, params)})
    return groups
