"""torch.optim.swa_utils: weights of a run averaged, rates annealed, statistics of norm layers renewed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from layca_fast import FusedLayca, layer_groups

from ..support import copy_of, norm_of, relative_distance, same_bits
from .loops import Batch, assert_turned, labelled_points

SWA_RATE, EPOCHS, START = 0.02, 6, 2


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))


class Run:
    """Epochs, of which those from ``START`` on are averaged."""

    def __init__(self, **options: Any) -> None:
        self.model = network()
        self.optimizer = FusedLayca(layer_groups(self.model), 0.1, momentum=0.9)
        self.averaged = AveragedModel(self.model, **options)
        self.scheduler = SWALR(self.optimizer, SWA_RATE, anneal_epochs=3)
        self.visited: list[list[Tensor]] = []

    def epoch(self, number: int, batches: list[Batch]) -> None:
        for inputs, labels in batches:
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(inputs), labels).backward()
            self.optimizer.step()
        if number >= START:
            self.averaged.update_parameters(self.model)
            self.visited.append(copy_of(list(self.model.parameters())))
        self.scheduler.step()

    def parts(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.averaged, self.scheduler


def test_the_mean_of_rotating_weights(seed: int) -> None:
    """It lies inside of the sphere; the rate ends at swa_lr; norm layers get the statistics of the mean weights."""
    run, batches = Run(), labelled_points(4)
    for number in range(EPOCHS):
        run.epoch(number, batches)
    for mean, *visited in zip(run.averaged.parameters(), *run.visited, strict=True):
        assert relative_distance(mean, torch.stack(visited).double().mean(0)) <= 1e-6
    for index in (0, 3):
        assert norm_of(run.averaged.module[index].weight) < 0.9999 * norm_of(run.model[index].weight)
    stats = run.optimizer.rotation_stats()[run.model[0].weight]
    assert float(stats.angle) == pytest.approx(math.atan(SWA_RATE))

    update_bn([inputs for inputs, _ in batches], run.averaged)
    hidden = torch.cat([run.averaged.module[0](inputs) for inputs, _ in batches])
    assert relative_distance(run.averaged.module[1].running_mean, hidden.mean(0)) <= 1e-5


@pytest.mark.parametrize("keep", [False, True], ids=["initial radius", "radius reset"])
def test_training_goes_on_from_the_mean(keep: bool, seed: int) -> None:
    """Back on the old sphere after a step, or on one of the mean's own norm; it turns by the rate in either case."""
    run, batches = Run(), labelled_points(4)
    for number in range(EPOCHS):
        run.epoch(number, batches)
    weight = run.model[0].weight
    norms = {False: norm_of(weight), True: norm_of(run.averaged.module[0].weight)}
    run.model.load_state_dict(run.averaged.module.state_dict())
    if keep:
        run.optimizer.reset_radius()
    before = copy_of(weight)
    run.epoch(EPOCHS, batches[:1])
    assert norm_of(weight) == pytest.approx(norms[keep], rel=1e-6)
    assert norms[True] != pytest.approx(norms[False], rel=1e-4)
    assert_turned(before, weight, SWA_RATE)


@pytest.mark.parametrize("ema", [False, True], ids=["mean", "moving average"])
def test_a_resumed_run_is_the_uninterrupted_one(ema: bool, seed: int) -> None:
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if ema else {}
    batches = labelled_points(4)
    whole, resumed = Run(**options), Run(**options)
    for number in range(EPOCHS):
        if number == START + 1:
            for part, other in zip(resumed.parts(), whole.parts(), strict=True):
                part.load_state_dict(copy_of(other.state_dict()))
        for run in (whole, resumed):
            if run is whole or number > START:
                run.epoch(number, batches)
    assert same_bits(*[copy_of([part.state_dict() for part in run.parts()]) for run in (resumed, whole)])
