"""RotationMonitor as a callback of Lightning and of Hugging Face's Trainer, and TensorBoard's own writer."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerControl, TrainerState, TrainingArguments

from layca_fast import Curves, FusedLayca, RotationMonitor
from layca_fast.callbacks import huggingface
from layca_fast.callbacks import lightning as for_lightning
from layca_fast.monitor.curves import QUANTITIES
from layca_fast.monitor.reading import read_curves
from layca_fast.monitor.writers import CsvWriter, JsonLinesWriter, TensorBoardWriter

from ..support import same_bits

STEPS = 6


def numbers(curves: Curves) -> list[Any]:
    return [curves.names, curves.steps, *(torch.nan_to_num(getattr(curves, name), nan=-7.0) for name in QUANTITIES)]


class Module(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor) -> Tensor:
        return self.model(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), 0.02)


def fit(model: nn.Module, callback: Any, batches: list[Tensor], folder: Path, **options: Any) -> lightning.Trainer:
    checkpoint = options.pop("ckpt_path", None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "max_epochs": 1, **quiet}
    callbacks = [] if callback is None else [callback]
    trainer = lightning.Trainer(default_root_dir=folder, callbacks=callbacks, **{**settings, **options})
    trainer.fit(Module(model), DataLoader(batches, batch_size=None), ckpt_path=checkpoint)
    return trainer


def test_lightning_records_its_steps_and_resumes(tmp_path: Path, seed: int) -> None:
    """Batches are accumulated; what trains is not touched; a resumed curve is the uninterrupted one."""
    model, batches = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), list(torch.randn(2 * STEPS, 3, 6))
    start, alone = copy.deepcopy(model), copy.deepcopy(model)
    options = {"accumulate_grad_batches": 2}
    fit(alone, None, batches, tmp_path, **options)
    first = for_lightning.RotationCallback([CsvWriter(tmp_path / "run.csv")], per_step=True)
    watched = copy.deepcopy(start)
    fit(watched, first, batches, tmp_path, **options)
    assert same_bits(dict(watched.state_dict()), dict(alone.state_dict()))
    assert first.monitor is not None
    curves = first.monitor.curves
    assert curves.names == ["model.0.weight", "model.1.weight"]
    assert curves.steps == list(range(STEPS + 1))
    assert same_bits(numbers(read_curves(tmp_path / "run.csv")), numbers(curves))

    whole, twin = for_lightning.RotationCallback(per_step=True, every=2), copy.deepcopy(start)
    trainer = fit(copy.deepcopy(start), whole, batches, tmp_path, max_epochs=1, **options)
    trainer.save_checkpoint(tmp_path / "between.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, DataLoader(batches, batch_size=None), ckpt_path=tmp_path / "between.ckpt")
    resumed = for_lightning.RotationCallback(per_step=True, every=2)
    fit(twin, resumed, batches, tmp_path, max_epochs=2, ckpt_path=tmp_path / "between.ckpt", **options)
    uninterrupted = for_lightning.RotationCallback(per_step=True, every=2)
    fit(copy.deepcopy(start), uninterrupted, batches, tmp_path, max_epochs=2, **options)
    assert uninterrupted.monitor is not None
    assert uninterrupted.monitor.curves.steps == list(range(0, 2 * STEPS + 1, 2))
    for each in (whole, resumed):
        assert each.monitor is not None
        assert same_bits(numbers(each.monitor.curves), numbers(uninterrupted.monitor.curves))


def language_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def trainer_for(model: nn.Module, data: Any, folder: Path, callback: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        logging_steps=2,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
    )
    callbacks = [] if callback is None else [callback]
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)


def test_huggingface_records_its_steps_and_resumes(tmp_path: Path, seed: int) -> None:
    tokens = torch.randint(24, (60, 8))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    model = language_model()
    alone, twin = copy.deepcopy(model), copy.deepcopy(model)
    trainer_for(alone, data, tmp_path / "alone", None).train()
    whole = huggingface.RotationCallback([JsonLinesWriter(tmp_path / "run.jsonl")], keep="sketch", per_step=True)
    trainer_for(model, data, tmp_path / "run", whole).train()
    assert same_bits(dict(model.state_dict()), dict(alone.state_dict()))
    assert whole.monitor is not None
    curves = whole.monitor.curves
    assert curves.steps == list(range(STEPS + 1))
    assert "model.layers.1.mlp.up_proj.weight" in curves.names
    assert "lm_head.weight" in curves.names
    assert "model.embed_tokens.weight" not in curves.names
    assert same_bits(numbers(read_curves(tmp_path / "run.jsonl")), numbers(curves))

    checkpoint = str(tmp_path / "run/checkpoint-4")
    for folder in ("elsewhere", "run"):
        resumed = huggingface.RotationCallback(keep="sketch", per_step=True)
        trainer = trainer_for(copy.deepcopy(twin), data, tmp_path / folder, resumed)
        trainer.args.resume_from_checkpoint = checkpoint if folder == "elsewhere" else None
        trainer.train(resume_from_checkpoint=checkpoint)
        assert resumed.monitor is not None
        assert same_bits(numbers(resumed.monitor.curves), numbers(curves))

    (tmp_path / "run/checkpoint-4/rotation_monitor.pt").unlink()
    late = huggingface.RotationCallback()
    with pytest.warns(UserWarning, match=r"rotation_monitor\.pt is missing: rotation counts from .* step 4"):
        trainer_for(copy.deepcopy(twin), data, tmp_path / "run", late).train(
            resume_from_checkpoint=str(tmp_path / "run/checkpoint-4")
        )
    assert late.monitor is not None
    assert late.monitor.curves.steps == [4, 5, 6]
    assert not late.monitor.curves.rotation[0].any()


def test_tensorboard_has_the_curves_and_the_figure(tmp_path: Path, seed: int) -> None:
    model = nn.Linear(4, 3)
    monitor, writer = RotationMonitor(model), TensorBoardWriter(tmp_path)
    for _ in range(3):
        model.weight.data += torch.randn(3, 4)
        monitor.record()
    writer.write(monitor)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("rotation/weight")]
    assert [step for step, _ in found] == [0, 1, 2, 3]
    assert [value for _, value in found] == pytest.approx(monitor.curves.of("weight"), rel=1e-6)
    (image,) = events.Images("layer rotation")
    assert image.width > 1000


def test_importing_layca_fast_imports_no_trainer() -> None:
    code = "import sys, layca_fast, layca_fast.writers, layca_fast.callbacks.recorder; print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    packages = {name.partition(".")[0] for name in printed.split()}
    assert "layca_fast" in packages
    assert not packages & {"lightning", "pytorch_lightning", "transformers", "tensorboard", "matplotlib"}


class Recommended(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return FusedLayca(self.model.parameters(), base="adam")


def test_a_short_training_at_the_recommended_rate_is_told_of_it(tmp_path: Path, seed: int) -> None:
    """The callbacks know how long it will be; who has chosen a rate, or trains long, is left alone."""
    batches = list(torch.randn(STEPS, 3, 6))
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, callbacks=[for_lightning.RotationCallback()], **quiet
    )
    with pytest.warns(UserWarning, match=f"lr=None recommends .*'adam'.* only {STEPS} steps: .*lr=3\\*\\*-3"):
        trainer.fit(Recommended(nn.Linear(6, 5)), DataLoader(batches, batch_size=None))

    weight = nn.Parameter(torch.randn(3, 4))
    cases = [
        (FusedLayca([weight], base="adam"), 999, 1),
        (FusedLayca([weight], base="adam"), 1000, 0),
        (FusedLayca([weight], 3**-5, base="adam"), 10, 0),
        (FusedLayca([{"params": [weight], "lr": 3**-3}], base="adam"), 10, 0),
        (FusedLayca([{"params": [weight], "lr_factor": 0.5}], base="adam"), 10, 1),
        (FusedLayca([weight]), 10, 0),
        (FusedLayca([weight], base="muon"), 10, 0),
        (torch.optim.Adam([weight]), 10, 0),
    ]
    warming_up = FusedLayca([weight], base="adam")
    lr_scheduler.LambdaLR(warming_up, lambda step: step / 10)
    cases.append((warming_up, 10, 1))
    for optimizer, steps, count in cases:
        state = TrainerState(max_steps=steps)
        arguments = TrainingArguments(str(tmp_path), use_cpu=True)
        callback = huggingface.RotationCallback()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callback.on_train_begin(arguments, state, TrainerControl(), model=nn.Linear(4, 3), optimizer=optimizer)
        assert sum("lr=None recommends" in str(each.message) for each in caught) == count, (optimizer, steps)
