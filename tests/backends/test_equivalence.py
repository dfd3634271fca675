"""Every backend against the float64 reference, at the tolerances that the README promises."""

import itertools
from dataclasses import replace

import pytest
import torch

from layca_fast.commands.cases import BASE_OPTIONS, ODD_SHAPES, Case, shapes_of
from layca_fast.commands.verify import compare
from layca_fast.formulas.options import RULES

from ..pairs import ChosenCase
from ..support import BACKENDS, on_every_backend

DTYPES = (torch.float32, torch.float64)
RADII = ("initial", "current")
CHUNKS = ((1, ODD_SHAPES), (3, ((6, 40), (9, 5, 7), (3, 129))), ("all", ((6, 40), (5, 3, 11), (2, 1025))))

#: The interpreter takes milliseconds per tile: it gets one tensor of several tiles, and of the others those of a kind
#: of their own.
FEW_CHUNKS = (
    (1, ((46, 45), (8, 3, 3, 3), (1, 1), (2, 1), (33,), (), (4, 0))),
    (3, ((6, 40), (3, 129))),
    ("all", ((3, 40), (2, 3, 11), (2, 1025))),
)


def steps_of(backend: str) -> int:
    return 3 if backend == "triton" else 10


def cases(interpreted: bool = False) -> list[ChosenCase]:
    """Every base option and rule with every dtype, chunking and radius, none at neutral hyperparameters.

    ``interpreted``: every second of them, under every base option all that any three of the choices can be together.
    """
    chosen = itertools.product(*map(enumerate, (RULES, FEW_CHUNKS if interpreted else CHUNKS, RADII, DTYPES)))
    rows = [tuple(zip(*each, strict=True)) for each in chosen]
    return [
        ChosenCase(
            name=f"{options}, {rule}, chunks={chunks}, radius={radius}, {dtype}",
            shapes=shapes_of({**options, "chunks": chunks}, shapes),
            options={
                **options,
                "rule": rule,
                "chunks": chunks,
                "radius": radius,
                "weight_decay": 0.0 if chunks != 1 else 0.02,
            },
            dtype=dtype,
            lr=0.03,
            choices=(base, *numbers),
        )
        for (base, options), (numbers, (rule, (chunks, shapes), radius, dtype)) in itertools.product(
            enumerate(BASE_OPTIONS), rows
        )
        if not (interpreted and sum(numbers) % 2)
    ]


@pytest.mark.filterwarnings("ignore:weight_decay=.* is ignored")
@pytest.mark.parametrize(
    "case",
    [replace(case, backend=backend) for backend in BACKENDS for case in cases(interpreted=backend == "triton")],
    ids=lambda case: f"{case.backend}-{case.name}",
)
def test_follows_the_reference(case: ChosenCase, seed: int) -> None:
    """Angle and norm of every step, and the weights after the last."""
    errors = compare(replace(case, steps=steps_of(case.backend)), case.backend, torch.device("cpu"), seed)
    assert errors.passed, errors


@on_every_backend("options", BASE_OPTIONS, every=3)
def test_follows_the_reference_for_many_steps(backend: str, options: dict[str, object], seed: int) -> None:
    """Errors must not add up."""
    steps = 15 if backend == "triton" else 50
    case = Case("many steps", shapes_of(options, ((9, 21), (7,))), options, steps=steps, lr=0.03)
    errors = compare(case, backend, torch.device("cpu"), seed)
    assert errors.passed, errors


LARGE = (
    Case("one large tensor", ((1024, 1025),), {"momentum": 0.9}, steps=5),
    Case("one large tensor of float64", ((1024, 1025),), {"momentum": 0.9, "nesterov": True}, torch.float64, 5),
    Case("a thousand small tensors", ((7, 11),) * 1000, {"base": "sgd_amom"}, steps=4),
    Case("a thousand slices", ((1000, 33),), {"momentum": 0.9, "chunks": "all"}, steps=5),
    Case("no rotation", ODD_SHAPES, {"momentum": 0.9, "rotate": False, "weight_decay": 0.1}),
    Case("everything rotates", ODD_SHAPES, {"momentum": 0.9, "rotate": True}),
    Case("ascent", ODD_SHAPES, {"momentum": 0.9, "maximize": True}),
    Case("large steps", ODD_SHAPES, {"momentum": 0.9}, lr=2.0),
    Case("small steps", ODD_SHAPES, {"momentum": 0.9}, lr=1e-4),
    Case("wide, tall and square matrices", ((65, 300), (300, 65), (130, 130), (64, 8, 3, 3)), {"base": "muon"}),
    Case("unequal parts", ((1000, 33), (1000, 129)), {"base": "adam", "chunks": (700, 100, 200)}),
    Case("unequal matrices", ((130, 65), (130, 7, 5)), {"base": "muon", "chunks": (65, 1, 64)}),
    Case("stacks of matrices", ((3, 20, 12, 40), (7, 20, 12)), {"momentum": 0.9, "chunks": ("matrices", 2)}),
    Case("stacks of matrices directed", ((3, 5, 12, 40), (7, 20, 12)), {"base": "muon", "chunks": "matrices"}),
    Case("many experts", ((60, 12, 20), (7, 20, 12)), {"base": "muon", "chunks": "all", "maximize": True}),
    Case("plain muon", ((65, 300), (64, 8, 3, 3)), {"base": "muon", "rotate": False, "weight_decay": 0.1}),
)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        # The torch backend takes many times as long, and knows no tiles: every fourth case here, the others in the
        # exhaustive tests.
        pytest.param(
            name, case, id=f"{name}-{case.name}", marks=[pytest.mark.exhaustive] * (name == "torch" and i % 4 > 0)
        )
        for name in BACKENDS
        if name != "triton"
        for i, case in enumerate(LARGE)
    ],
)
def test_native_backends_follow_the_reference_at_size(backend: str, case: Case, seed: int) -> None:
    """Shapes that cut layers into many tiles and batches of many tensors, and rates far from the default."""
    errors = compare(case, backend, torch.device("cpu"), seed)
    assert errors.passed, errors


@pytest.mark.parametrize("sine", [0.5, 0.3, 0.1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("n", [100, 1000, 10_000, 300_000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nearly_parallel_steps_turn_by_the_right_angle(backend: str, n: int, sine: float, seed: int) -> None:
    """q - d^2/n^2 cancels here: float32 dots would be 13 % off at a sine of 1e-3."""
    if backend == "triton" and n > 10_000:
        n = 20_000
    # Said, for a matrix of so many rows looks like a vocabulary's.
    case = Case(f"sin = {sine}", ((n // 10, 10),), {"rotate": True}, steps=3, lr=0.05, sine=sine)
    errors = compare(case, backend, torch.device("cpu"), seed)
    assert errors.passed, errors
