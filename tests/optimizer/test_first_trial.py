"""What a newcomer tries first, by following the README alone, trains as well as under AdamW.

The digits of scikit-learn and a network without normalisation, whose last layer docs/fixed_norms.md keeps off the
sphere. Trials with transformers are in tests/trainers.
"""

from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from layca_fast import FusedLayca, layer_groups

EPOCHS, BATCH, TRAIN = 30, 64, 1347


def trained(make: Callable[[nn.Sequential], Optimizer], start: int) -> tuple[float, float]:
    """Test accuracy and training loss."""
    torch.manual_seed(start)
    images, labels = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    order = torch.randperm(len(labels))
    images, labels = images[order].float() / 16, labels[order]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = make(model)
    scheduler = CosineAnnealingLR(optimizer, EPOCHS * -(-TRAIN // BATCH))
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAIN).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        accuracy = (model(images[TRAIN:]).argmax(1) == labels[TRAIN:]).double().mean().item()
        return accuracy, nn.functional.cross_entropy(model(images[:TRAIN]), labels[:TRAIN]).item()


def adamw(model: nn.Sequential) -> Optimizer:
    return AdamW(model.parameters(), lr=3e-3)


def head_off_the_sphere(model: nn.Sequential) -> Optimizer:
    return FusedLayca(layer_groups(model, rotate={model[-1]: False}), lr=3**-3, base="adam")


def all_on_the_sphere(model: nn.Sequential) -> Optimizer:
    return FusedLayca(layer_groups(model), lr=3**-3, base="adam")


@pytest.mark.parametrize("make", [head_off_the_sphere])
def test_a_network_without_normalisation_ends_within_a_point_of_adamw(
    make: Callable[[nn.Sequential], Optimizer], one_thread: None, seed: int
) -> None:
    """And what the page says of the trap is so: with every norm fixed the loss stands still."""
    (theirs, _), (ours, loss) = trained(adamw, seed), trained(make, seed)
    assert ours >= theirs - 0.01
    assert loss < 0.05
    accuracy, capped = trained(all_on_the_sphere, seed)
    assert accuracy < ours
    assert capped > 0.2
