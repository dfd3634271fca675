"""layca_fast.diagnostics on a GPU: the same numbers as on the CPU, and the GPU's random state as it was."""

import copy

import pytest
import torch
from torch import Tensor, nn

from layca_fast.diagnostics import IterativeRefinement, LayerConditioning, gradient_covariance, norm_propagation

from .support import GPU, ON_GPU

pytestmark = ON_GPU


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(h)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), Block(), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)).double()


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).square().mean()


def measured(model: nn.Module, batches: list[Tensor]) -> list[float]:
    """Every diagnostic, as plain numbers."""
    with LayerConditioning(model) as conditioning, IterativeRefinement(model, ["1"]) as refinement:
        loss_of(model, batches[0]).backward()
    values = []
    for condition in conditioning.records[0].values():
        assert condition.gradients is not None
        values += [condition.inputs.largest, condition.inputs.condition(0.5), condition.gradients.largest]
    values += [refinement.records[0]["1"].cosine, refinement.records[0]["1"].ratio]
    values += gradient_covariance(model, lambda batch: loss_of(model, batch), batches).eigenvalues[:2].tolist()
    for ratios in norm_propagation(model, batches[0], lambda outputs: outputs.exp().sum(1)).values():
        values += [ratios.activation, ratios.gradient]
    return values


def test_numbers_are_those_of_the_cpu(seed: int) -> None:
    model, batches = network(), [torch.randn(5, 2, 6, 6, dtype=torch.float64) for _ in range(3)]
    on_gpu = copy.deepcopy(model).to(GPU)
    assert measured(on_gpu, [batch.to(GPU) for batch in batches]) == pytest.approx(measured(model, batches), rel=1e-7)


def test_the_random_state_of_the_gpu_is_kept(seed: int) -> None:
    """Dropout draws from it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)).to(GPU)
    state = torch.cuda.get_rng_state(GPU)
    gradient_covariance(model, lambda batch: loss_of(model, batch), [torch.randn(4, 8).to(GPU) for _ in range(3)])
    norm_propagation(model, torch.randn(4, 8).to(GPU), lambda outputs: outputs.sum(1))
    assert torch.equal(torch.cuda.get_rng_state(GPU), state)
