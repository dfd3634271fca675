"""accelerate: it takes the steps of a loop written by hand, and resumes bit for bit."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from layca_fast import FusedLayca, RotationMonitor, attach

from ..support import copy_of, same_bits
from .loops import Batch, classifier, labelled_points, overflowing_scaler, rotating, train_by_hand

CLIP, STEPS = 0.05, 6


def fused(model: nn.Module, **options: Any) -> Optimizer:
    return FusedLayca(model.parameters(), 0.05, momentum=0.9, dampening=0.2, **options)


def attached(model: nn.Module) -> Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0)
    attach(optimizer)
    return optimizer


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps its settings for the whole process."""
    yield
    forget_settings()


def forget_settings() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """A run as accelerate's documentation writes it. ``precision`` "fp16" it refuses on CPUs when it is made, alone."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, precision: str = "no", accumulate: int = 1) -> None:
        forget_settings()
        on_cpu = "no" if precision == "fp16" else precision
        self.accelerator = Accelerator(cpu=True, mixed_precision=on_cpu, gradient_accumulation_steps=accumulate)
        if precision == "fp16":
            self.accelerator.state._mixed_precision = precision
            self.accelerator.native_amp = True
            self.accelerator.scaler = overflowing_scaler()
        scheduler = ExponentialLR(optimizer, 0.9)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)

    def epoch(self, batches: list[Batch], clip: float | None = None) -> list[bool]:
        """Returns, for every step, whether it was taken."""
        taken = []
        for inputs, labels in self.accelerator.prepare(DataLoader(batches, batch_size=None)):
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss = nn.functional.cross_entropy(self.model(inputs), labels)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and clip is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    taken.append(not self.optimizer.step_was_skipped)
        return taken

    def everything(self) -> Any:
        return copy_of([dict(self.model.state_dict()), self.optimizer.state_dict(), self.scheduler.get_last_lr()])


PRECISIONS = {"no": {}, "bf16": {"autocast": torch.bfloat16}, "fp16": {"autocast": torch.float16}}


@pytest.mark.parametrize("unscale_in_step", [False, True], ids=["standard path", "unscaled in the step"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_its_steps_are_those_of_a_loop_by_hand(precision: str, unscale_in_step: bool, seed: int) -> None:
    """Two batches accumulated, their gradients clipped, infinite gradients skipped.

    The schedule stands still at a skipped step only where accelerate sees it skipped, which is not in the step.
    """
    model, batches = classifier(), labelled_points(2 * STEPS)
    twin = copy.deepcopy(model)
    run = Run(model, fused(model, unscale_in_step=unscale_in_step), precision, accumulate=2)
    seen = run.epoch(batches, CLIP)

    optimizer = fused(twin)
    scheduler = ExponentialLR(optimizer, 0.9)
    scaler = overflowing_scaler() if precision == "fp16" else None
    options = {"accumulate": 2, "clip": CLIP, "scaler": scaler, "pause": not unscale_in_step, **PRECISIONS[precision]}
    taken = train_by_hand(twin, optimizer, scheduler, batches, **options)
    assert taken == ([True, True, False] * 2 if scaler else [True] * STEPS)
    assert seen == ([True] * STEPS if unscale_in_step else taken)
    expected = [dict(twin.state_dict()), optimizer.state_dict(), scheduler.get_last_lr()]
    assert same_bits(run.everything(), copy_of(expected))


@pytest.mark.parametrize("make", [fused, attached])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_is_the_uninterrupted_one(precision: str, make: Any, tmp_path: Path, seed: int) -> None:
    """Bit for bit, from the end of an epoch, with dropout; ``save_state`` keeps the state of random numbers, too."""

    def fresh() -> Run:
        model = nn.Sequential(classifier(), nn.Dropout(0.3))
        return Run(model, make(model), precision)

    batches = labelled_points(2)
    whole = fresh()
    whole.epoch(batches)
    whole.accelerator.save_state(str(tmp_path))
    taken = whole.epoch(batches)
    assert taken == [precision != "fp16", True]

    resumed = fresh()
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.epoch(batches) == taken
    assert same_bits(resumed.everything(), whole.everything())
    assert rotating(whole.optimizer) == 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_monitor_records_the_steps_that_are_taken(precision: str, seed: int) -> None:
    """Attached to accelerate's wrapper, which has no hooks of its own; a skipped step is none."""
    model = classifier()
    run = Run(model, fused(model), precision)
    with RotationMonitor(run.optimizer, per_step=True).attach() as monitor:
        taken = run.epoch(labelled_points(3))
    assert taken.count(True) == (2 if precision == "fp16" else 3)
    assert monitor.curves.steps == list(range(taken.count(True) + 1))
    assert (monitor.curves.angle[1:] > 0.01).all()
    run.epoch(labelled_points(2))
    assert monitor.step == taken.count(True)
