"""RotationCallback(check_norms=...): a norm that other code has changed ends the training at that step, or is told."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from layca_fast import FusedLayca, NormDriftError, layer_groups
from layca_fast.callbacks import huggingface
from layca_fast.callbacks import lightning as for_lightning

#: The step after which somebody writes to the weights: the next one finds it.
WRITTEN_AFTER, STEPS = 3, 6


def halve(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(0.5)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))

    def training_step(self, batch: Tensor) -> Tensor:
        return self.model(batch).sub(1).square().mean()

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index == WRITTEN_AFTER:
            halve(self.model.get_parameter("2.weight"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return FusedLayca(layer_groups(self.model), 0.02, base="adam")


def fit_lightning(folder: Path, **options: Any) -> int:
    callback = for_lightning.RotationCallback(every=5, check_norms=1e-3, **options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        default_root_dir=folder,
        callbacks=[callback],
        enable_checkpointing=False,
        **quiet,
    )
    try:
        trainer.fit(Module(), DataLoader(list(torch.randn(STEPS, 3, 6)), batch_size=None))
    finally:
        reached = trainer.global_step
    return int(reached)


class Writes(TrainerCallback):  # type: ignore[misc]
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == WRITTEN_AFTER:
            halve(model.get_parameter("model.layers.1.mlp.up_proj.weight"))


def fit_huggingface(folder: Path, **options: Any) -> int:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    optimizer = FusedLayca(layer_groups(model), 0.02, base="adam")
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    callback = huggingface.RotationCallback(every=5, check_norms=1e-3, **options)
    tokens = torch.randint(24, (24, 8))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(
        model, arguments, train_dataset=data, callbacks=[callback, Writes()], optimizers=(optimizer, None)
    )
    trainer.train()
    return int(trainer.state.global_step)


FITS = {
    "Lightning": (fit_lightning, r"2\.weight"),
    "Hugging Face": (fit_huggingface, r"layers\.1\.mlp\.up_proj\.weight"),
}


@pytest.mark.parametrize("trainer", FITS)
def test_a_foreign_write_ends_the_training_at_the_step_that_finds_it(trainer: str, tmp_path: Path, seed: int) -> None:
    fit, name = FITS[trainer]
    with pytest.raises(NormDriftError, match=rf"1 of \d+ layers.*{name} -0\.5"):
        fit(tmp_path)


@pytest.mark.parametrize("trainer", FITS)
def test_or_is_warned_of_once_and_the_training_goes_on(trainer: str, tmp_path: Path, seed: int) -> None:
    fit, _ = FITS[trainer]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fit(tmp_path, on_drift="warn") == STEPS
    told = [str(each.message) for each in caught if "norm of their radius" in str(each.message)]
    assert len(told) == 1
    assert "-0.5" in told[0]
