"""The Trainer of Hugging Face: it takes the steps of a loop written by hand, and resumes bit for bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from layca_fast import FusedLayca, attach, layer_groups

from ..support import copy_of, same_bits
from .loops import rotating

STEPS, CLIP = 6, 0.05


def language_model(dropout: float = 0.0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


def sentences() -> list[dict[str, Tensor]]:
    tokens = torch.randint(24, (40, 8))
    labels = torch.where(torch.rand(40, 8) < 0.3, -100, tokens)
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def fused(model: nn.Module) -> Optimizer:
    return FusedLayca(layer_groups(model), 0.02, base="adam")


def attached(model: nn.Module) -> Optimizer:
    optimizer = torch.optim.AdamW(layer_groups(model, lr=0.02), 0.02, weight_decay=0)
    attach(optimizer)
    return optimizer


def trainer_for(
    model: nn.Module,
    data: list[dict[str, Tensor]],
    folder: Path,
    make: Callable[[nn.Module], Optimizer] = fused,
    **options: Any,
) -> Trainer:
    optimizer = make(model)
    scheduler = LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        max_grad_norm=CLIP,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    return Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, scheduler))


def everything(trainer: Trainer) -> Any:
    return copy_of(
        [dict(trainer.model.state_dict()), trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict()]
    )


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_its_steps_are_those_of_a_loop_by_hand(bf16: bool, tmp_path: Path, seed: int) -> None:
    """Two batches accumulated, their gradients clipped, the schedule followed."""
    model, data = language_model(), sentences()
    twin = copy.deepcopy(model)
    trainer = trainer_for(model, data, tmp_path, bf16=bf16, gradient_accumulation_steps=2)
    batches: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: batches.append(copy_of(kwargs)), with_kwargs=True)
    trainer.train()

    assert len(batches) == 2 * STEPS
    optimizer = fused(twin)
    scheduler = LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    twin.train()
    for pair in zip(batches[::2], batches[1::2], strict=True):
        for batch in pair:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = twin(**batch).loss
            loss.backward()
        assert nn.utils.clip_grad_norm_(twin.parameters(), CLIP) > CLIP
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    expected = [dict(twin.state_dict()), optimizer.state_dict(), scheduler.state_dict()]
    assert same_bits(everything(trainer), copy_of(expected))


RESUMED = (
    pytest.param(torch.float32, {}, id="float32"),
    pytest.param(torch.float32, {"bf16": True, "gradient_accumulation_steps": 2}, id="bf16, accumulated"),
    pytest.param(torch.bfloat16, {}, id="bfloat16 weights"),
    pytest.param(torch.float32, {"make": attached}, id="attached to AdamW"),
)


@pytest.mark.parametrize(("dtype", "options"), RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(
    dtype: torch.dtype, options: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    """Bit for bit, with data in random order and dropout; remainders of 16-bit weights are in the checkpoint, too."""
    data = sentences()
    model = language_model(dropout=0.2).to(dtype)
    options = {"save_strategy": "steps", "save_steps": 2, **options}
    whole = trainer_for(model, data, tmp_path, **options)
    whole.train()

    resumed = trainer_for(language_model(dropout=0.2).to(dtype), data, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == whole.state.global_step == STEPS
    assert same_bits(everything(resumed), everything(whole))
    remainders = [state for state in resumed.optimizer.state_dict()["state"].values() if "remainder" in state]
    assert bool(remainders) == (dtype == torch.bfloat16)
    assert rotating(whole.optimizer) == 2 * 7, "all but the head"


def test_types_of_transformers_own_and_the_trainers_own_schedule(tmp_path: Path, seed: int) -> None:
    """As docs/trainers.md has it of GPT-2, whose matrices are Conv1D and whose head is its embedding."""
    config = GPT2Config(vocab_size=24, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    optimizer = FusedLayca(layer_groups(model, rotate=[Conv1D]), 0.02)
    rates: list[float] = []
    optimizer.register_step_post_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=4, save_strategy="no", report_to=[])
    Trainer(model, arguments, train_dataset=sentences(), optimizers=(optimizer, None)).train()
    assert rates == pytest.approx([0.02, 0.015, 0.01, 0.005])
    matrices = {param for module in model.modules() if isinstance(module, Conv1D) for param in [module.weight]}
    assert {param for param, state in optimizer.state.items() if "radius" in state} == matrices
    assert len(matrices) == 2 * 4
