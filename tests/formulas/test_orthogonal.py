"""Muon's direction beside the singular value decomposition, and its plain steps beside torch.optim.Muon."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from layca_fast import FusedLayca
from layca_fast.formulas.bases import BASES
from layca_fast.formulas.orthogonal import NewtonSchulz
from layca_fast.reference import newton_schulz, reference_step

from ..support import (
    TORCH,
    clones,
    native_backends,
    norm_of,
    parameter,
    random_gradients,
    relative_distance,
    same_bits,
    train,
)

#: torch.optim.Muon came with torch 2.9.
beside_torchs_muon = pytest.mark.skipif(TORCH < (2, 9), reason="this torch has no Muon")

CPU = torch.device("cpu")
OPTIONS = BASES["muon"].options

#: What five iterations make of singular values from a 300th of the norm on, to three digits.
LOWEST, HIGHEST = 0.67, 1.21


def directions_of(matrices: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
    """The directions of (count, rows, columns), rows <= columns; scratch is poisoned."""
    direction = NewtonSchulz.of({**OPTIONS, "ns_dtype": dtype, **options}, matrices.dtype, CPU)
    stack = matrices.to(dtype, copy=True)
    room = stack.new_full((direction.room(*stack.shape),), torch.nan)
    return direction.run(stack, torch.linalg.matrix_norm(matrices.double()), room)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 16, 16), (2, 20, 30), (1, 8, 64), (1, 1, 9), (2, 130, 400), (1, 330, 340), (1, 400, 900)], ids=str
)
def test_singular_vectors_stay_and_singular_values_come_near_1(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    count, rows, _ = shape
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    # Of a norm that must not matter, spread over what the iterations reach.
    spread = torch.rand(count, rows, dtype=torch.float64) + 0.02
    scale = 10.0 ** torch.randint(-6, 7, (count, 1, 1))
    matrices = scale * left @ torch.diag_embed(spread) @ right
    result = directions_of(matrices, dtype).double()
    values = left.mT @ result @ right.mT
    assert relative_distance(values, torch.diag_embed(values.diagonal(dim1=1, dim2=2))) < 1e-4
    reached = spread / torch.linalg.vector_norm(spread, dim=1, keepdim=True) > 1 / 300
    assert reached.any()
    assert bool(values.diagonal(dim1=1, dim2=2)[reached].ge(LOWEST).all())
    assert bool(values.diagonal(dim1=1, dim2=2).le(HIGHEST).all())


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 10, 50)], ids=str)
def test_any_number_of_iterations_follows_the_reference(shape: tuple[int, ...], steps: int, seed: int) -> None:
    matrices = torch.randn(shape, dtype=torch.float64)
    options = {"ns_steps": steps, "ns_coefficients": (3.1, -3.7, 1.5)}
    result = directions_of(matrices, torch.float64, **options)
    for ours, matrix in zip(result, matrices, strict=True):
        assert relative_distance(ours, newton_schulz(matrix, steps, (3.1, -3.7, 1.5), 1e-7)) < 1e-11


@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_zeros_stay_zeros_beside_others(eps: float, seed: int) -> None:
    matrices = torch.randn(3, 6, 6)
    matrices[1] = 0
    result = directions_of(matrices, torch.float32, eps=eps)
    assert torch.equal(result[1], torch.zeros(6, 6))
    assert bool(result.isfinite().all())
    assert norm_of(result[0]) > 1


@beside_torchs_muon
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.8, "nesterov": False}, {"adjust_lr": "match_rms_adamw"}, {"adjust_lr": "original"}],
    ids=str,
)
@native_backends
def test_plain_steps_are_those_of_torch(backend: str, options: Mapping[str, Any], seed: int) -> None:
    """In its type, bfloat16: as close to the exact steps as torch's own are. The momentum is float32 in both."""
    shapes = ((20, 30), (30, 20), (16, 16), (1, 5), (40, 3))
    ours = [parameter(*shape, backend=backend) for shape in shapes for _ in range(10)]
    theirs = clones(ours)
    starts = clones(ours)
    plain = {"weight_decay": 0.1, **options}
    optimizer = FusedLayca(ours, 0.02, base="muon", rotate=False, ns_dtype=torch.bfloat16, backend=backend, **plain)
    plain["adjust_lr_fn"] = plain.pop("adjust_lr", None)
    other = torch.optim.Muon(theirs, lr=0.02, **plain)
    gradients = random_gradients(ours, 3)
    train(optimizer, gradients)
    train(other, gradients)
    errors: list[tuple[float, float]] = []
    for i, (mine, their, start) in enumerate(zip(ours, theirs, starts, strict=True)):
        exact, state = start.detach().double(), {}
        for row in gradients:
            reference_step(
                exact, row[i].double(), state, lr=0.02, base="muon", rotate=False, weight_decay=0.1, **options
            )
        gone = norm_of(start.double() - exact)
        errors.append((norm_of(mine.double() - exact) / gone, norm_of(their.double() - exact) / gone))
        buffers = optimizer.state[mine]["momentum_buffer"], other.state[their]["momentum_buffer"]
        assert relative_distance(*buffers) <= 1e-6
    # Of a single matrix either may be the lucky one: what a small one loses hangs on the rounding of its norm.
    for first in range(0, len(errors), 10):
        own, torchs = zip(*errors[first : first + 10], strict=True)
        assert sum(own) <= 1.5 * sum(torchs)


@beside_torchs_muon
def test_names_and_defaults_are_those_of_torch() -> None:
    theirs = torch.optim.Muon([parameter(2, 2)]).defaults
    for name, value in OPTIONS.items():
        if name != "ns_dtype":
            assert theirs["adjust_lr_fn" if name == "adjust_lr" else name] == value, name
    assert FusedLayca([parameter(2, 2)], base="muon").param_groups[0]["lr"] == 2**-4


@beside_torchs_muon
@native_backends
def test_a_run_may_go_over_from_torch_in_its_middle(backend: str, seed: int) -> None:
    theirs = [parameter(20, 30), parameter(30, 20)]
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0)
    train(other, random_gradients(theirs, 5))
    ours = clones(theirs)
    optimizer = FusedLayca(ours, 0.02, base="muon", rotate=False, ns_dtype=torch.bfloat16, backend=backend)
    with pytest.warns(UserWarning, match="hyperparameters"):
        optimizer.load_state_dict(other.state_dict())
    starts = clones(ours)
    gradients = random_gradients(theirs, 3)
    train(optimizer, gradients)
    train(other, gradients)
    for mine, their, start in zip(ours, theirs, starts, strict=True):
        assert norm_of(mine - their) <= 2**-6 * norm_of(their - start)
    assert not same_bits(ours[0].detach(), starts[0].detach())
