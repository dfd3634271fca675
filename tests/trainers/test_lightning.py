"""Lightning: automatic and manual optimization take the steps of a loop by hand, and runs resume bit for bit."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from layca_fast import FusedLayca, attach, layer_groups
from layca_fast.step.stats import RotationStats

from ..support import copy_of, norm_of, same_bits
from .loops import Batch, classifier, labelled_points, overflowing_scaler, rotating, train_by_hand

CLIP, STEPS = 0.05, 6
Make = Callable[[nn.Module], Optimizer]


def fused(model: nn.Module, **options: Any) -> Optimizer:
    return FusedLayca(layer_groups(model), 0.05, momentum=0.9, dampening=0.2, **options)


def attached(model: nn.Module) -> Optimizer:
    optimizer = torch.optim.AdamW(layer_groups(model, lr=0.05), 0.05, weight_decay=0)
    attach(optimizer)
    return optimizer


class Automatic(lightning.LightningModule):
    def __init__(self, model: nn.Module, make: Make = fused) -> None:
        super().__init__()
        self.model, self.make = model, make

    def loss(self, batch: Batch) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.model(inputs), labels)

    def training_step(self, batch: Batch) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make(self.model)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"},
        }


class Manual(Automatic):
    """Accumulates two batches, and clips."""

    def __init__(self, model: nn.Module, make: Make = fused) -> None:
        super().__init__(model, make)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Before optimizer.step() the gradients of float16 are still scaled.
        self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")


def trainer_for(folder: Path, **options: Any) -> lightning.Trainer:
    """``precision`` is as the Trainer takes it; "16-mixed" it refuses on CPUs, but takes the plugin behind it."""
    if options.get("precision") == "16-mixed":
        options["plugins"] = [MixedPrecision(options.pop("precision"), "cpu", overflowing_scaler())]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False, **quiet}
    return lightning.Trainer(default_root_dir=folder, **{**settings, **options})


def loader(batches: list[Batch]) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def everything(trainer: lightning.Trainer) -> Any:
    (optimizer,) = trainer.optimizers
    (scheduler,) = (config.scheduler for config in trainer.lr_scheduler_configs)
    return copy_of([dict(trainer.lightning_module.model.state_dict()), optimizer.state_dict(), scheduler.state_dict()])


#: Automatic optimization accumulates and clips by the Trainer's options, manual optimization in the training step.
KINDS = (
    pytest.param(Automatic, {"accumulate_grad_batches": 2, "gradient_clip_val": CLIP}, id="automatic"),
    pytest.param(Manual, {}, id="manual"),
)
PRECISIONS = {
    "32-true": {},
    "bf16-true": {"dtype": torch.bfloat16},
    "16-true": {"dtype": torch.float16},
    "bf16-mixed": {"autocast": torch.bfloat16},
    "16-mixed": {"autocast": torch.float16, "scales": True},
}


def by_hand(
    model: nn.Module,
    batches: list[Batch],
    make: Make = fused,
    dtype: torch.dtype = torch.float32,
    scales: bool = False,
    **options: Any,
) -> tuple[Any, list[bool]]:
    """Everything after training ``model``, and which steps were taken."""
    model.to(dtype)
    optimizer = make(model)
    scheduler = ExponentialLR(optimizer, 0.9)
    batches = [(inputs.to(dtype), labels) for inputs, labels in batches]
    scaler = overflowing_scaler() if scales else None
    taken = train_by_hand(model, optimizer, scheduler, batches, scaler=scaler, **options)
    return copy_of([dict(model.state_dict()), optimizer.state_dict(), scheduler.state_dict()]), taken


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_its_steps_are_those_of_a_loop_by_hand(
    kind: type[Automatic], options: dict[str, Any], precision: str, tmp_path: Path, seed: int
) -> None:
    """Two batches accumulated, their gradients clipped, the schedule followed, infinite gradients skipped."""
    model, batches = classifier(), labelled_points(2 * STEPS)
    twin = copy.deepcopy(model)
    trainer = trainer_for(tmp_path, precision=precision, **options)
    trainer.fit(kind(model), loader(batches))
    expected, taken = by_hand(twin, batches, accumulate=2, clip=CLIP, **PRECISIONS[precision])
    assert taken == ([True, True, False] * 2 if precision == "16-mixed" else [True] * STEPS)
    assert same_bits(everything(trainer), expected)


def test_what_unscales_in_the_step_is_skipped_there_and_not_clipped(tmp_path: Path, seed: int) -> None:
    model, batches = classifier(), labelled_points(STEPS)
    twin = copy.deepcopy(model)
    unscaling = partial(fused, unscale_in_step=True)
    trainer = trainer_for(tmp_path, precision="16-mixed")
    trainer.fit(Automatic(model, unscaling), loader(batches))
    expected, taken = by_hand(twin, batches, autocast=torch.float16, scales=True)
    assert taken == [True, True, False] * 2
    assert same_bits(everything(trainer), expected)

    clipping = trainer_for(tmp_path, precision="16-mixed", gradient_clip_val=CLIP)
    with pytest.raises(RuntimeError, match="FusedLayca, does not allow for gradient clipping"):
        clipping.fit(Automatic(classifier(), unscaling), loader(batches))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_an_attached_optimizer_steps_as_by_hand(
    kind: type[Automatic], options: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    """Automatic optimization makes the gradients in a closure, inside of the step."""
    model, batches = classifier(), labelled_points(2 * STEPS)
    twin = copy.deepcopy(model)
    trainer = trainer_for(tmp_path, **options)
    trainer.fit(kind(model, attached), loader(batches))
    expected, _ = by_hand(twin, batches, attached, accumulate=2, clip=CLIP)
    assert same_bits(everything(trainer), expected)


RESUMED = [*((precision, fused) for precision in PRECISIONS), ("32-true", attached)]


@pytest.mark.parametrize(("precision", "make"), RESUMED)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(
    kind: type[Automatic], options: dict[str, Any], precision: str, make: Make, tmp_path: Path, seed: int
) -> None:
    """Bit for bit, from the end of an epoch of four steps: Lightning resumes the data of a loader only from there."""
    batches = labelled_points(8)
    options = {"precision": precision, "max_epochs": 3, **options}

    def run(name: str, checkpoint: Path | None = None) -> lightning.Trainer:
        checkpoints = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
        trainer = trainer_for(tmp_path, callbacks=[checkpoints], enable_checkpointing=True, **options)
        trainer.fit(kind(classifier(), make), loader(batches), ckpt_path=checkpoint)
        return trainer

    whole = run("whole")
    resumed = run("resumed", tmp_path / "whole" / "epoch=0.ckpt")
    assert resumed.global_step == whole.global_step == 12
    assert same_bits(everything(resumed), everything(whole))
    assert rotating(whole.optimizers[0]) == 2


class Watching(Manual):
    """Doubles the weights half-way, and says so; keeps what the optimizer knows of its last step."""

    stats: dict[Tensor, RotationStats]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if batch_idx == STEPS:
            with torch.no_grad():
                for param in self.parameters():
                    param.mul_(2)
            optimizer.reset_radius()
        super().training_step(batch, batch_idx)
        self.stats = optimizer.rotation_stats()


def test_the_module_reaches_the_optimizers_own_methods(tmp_path: Path, seed: int) -> None:
    """``self.optimizers()`` gives a wrapper, which has the methods but not the attributes."""
    model = classifier()
    norm = norm_of(model[0].weight)
    module = Watching(model)
    trainer_for(tmp_path).fit(module, loader(labelled_points(2 * STEPS)))
    stats = module.stats[model[0].weight]
    assert float(stats.angle) == pytest.approx(math.atan(0.05 * 0.9 ** (STEPS - 1)))
    assert float(stats.radius) == pytest.approx(2 * norm)
    assert norm_of(model[0].weight) == pytest.approx(2 * norm)


class Unfreezing(BaseFinetuning):
    """Freezes the first layer, and adds its parameters, which have no names, at the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model[0], optimizer, lr=0.01)


@pytest.mark.parametrize(
    "make",
    [fused, lambda model: torch.optim.SGD(layer_groups(model, lr=0.05, names=False), 0.05)],
    ids=["FusedLayca", "SGD"],
)
def test_layers_that_are_unfrozen_later_are_trained(make: Make, seed: int) -> None:
    model, batches = classifier(), labelled_points(STEPS)
    weight = copy.deepcopy(model[0].weight)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **quiet}
    trainer = lightning.Trainer(callbacks=[Unfreezing()], max_epochs=3, **settings)
    trainer.fit(Automatic(model, make), DataLoader(batches, batch_size=None))
    assert not torch.equal(model[0].weight, weight)
    groups = trainer.optimizers[0].param_groups
    assert len({param for group in groups for param in group["params"]}) == len(list(model.parameters()))
