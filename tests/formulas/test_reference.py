"""The reference is the specification, so it is checked against the paper's words and against torch.optim."""

import math

import pytest
import torch

from layca_fast.reference import layca, reference_step


def test_layca_turns_towards_the_negative_projected_step(seed: int) -> None:
    """In the plane of weights and step, by hand: radius 5, and the step's orthogonal part points along +y."""
    weight = torch.tensor([5.0, 0.0], dtype=torch.float64)
    step = torch.tensor([123.0, 0.7], dtype=torch.float64)
    rho = 0.25
    expected = torch.tensor([5 * math.cos(math.atan(rho)), -5 * math.sin(math.atan(rho))], dtype=torch.float64)
    torch.testing.assert_close(layca(weight, step, rho, radius=5.0), expected, rtol=0, atol=1e-15)


def test_radius_rescales(seed: int) -> None:
    weight, step = torch.randn(2, 40, dtype=torch.float64)
    assert layca(weight, step, 0.1, radius=3.0).norm().item() == pytest.approx(3.0, rel=1e-14)
    assert layca(weight, step, 0.1, radius=None).norm().item() == pytest.approx(weight.norm().item(), rel=1e-14)


@pytest.mark.parametrize("step", ["zero", "parallel", "antiparallel"])
def test_no_direction_leaves_the_weights(step: str, seed: int) -> None:
    weight = torch.randn(40, dtype=torch.float64)
    factor = {"zero": 0.0, "parallel": 3.0, "antiparallel": -0.2}[step]
    assert torch.equal(layca(weight, factor * weight, 0.1, radius=9.0), weight)


SGD_OPTIONS = (
    {"momentum": 0.9},
    {"momentum": 0.7, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "maximize": True},
)


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_plain_sgd_equals_torch(options: dict[str, object], seed: int) -> None:
    ours = torch.randn(5, 6, dtype=torch.float64)
    theirs = ours.clone().requires_grad_()
    optimizer = torch.optim.SGD([theirs], lr=0.1, **options)
    state: dict[str, object] = {}
    for _ in range(10):
        theirs.grad = torch.randn_like(theirs)
        optimizer.step()
        reference_step(ours, theirs.grad, state, lr=0.1, rotate=False, **options)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-13, atol=1e-13)


def test_chunks_are_separate_layers(seed: int) -> None:
    weight, grad = torch.randn(2, 6, 7, dtype=torch.float64)
    slices = [weight[i : i + 2].clone() for i in (0, 2, 4)]
    state: dict[str, object] = {}
    reference_step(weight, grad, state, lr=0.2, base="sgd_amom", chunks=3)
    for i, part in enumerate(slices):
        reference_step(part, grad[2 * i : 2 * i + 2], {}, lr=0.2, base="sgd_amom")
    assert torch.equal(weight, torch.cat(slices))
