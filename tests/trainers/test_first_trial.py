"""What a newcomer tries first with transformers, GPT-2, trains as well as under AdamW: by hand and in the Trainer."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from layca_fast import FusedLayca, layer_groups

VOCABULARY, PERIOD, LENGTH, BATCH, STEPS = 24, 60, 16, 16, 300

#: Of AdamW, the best of a few.
PLAIN_LR = 3e-3


def gpt2() -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0))


def sentences(count: int) -> list[dict[str, Tensor]]:
    """Pieces of one sentence of random tokens that comes again and again: what follows is known after a few tokens."""
    text = torch.randint(VOCABULARY, (PERIOD,)).repeat(2)
    starts = torch.randint(PERIOD, (count,)).tolist()
    rows = [text[start : start + LENGTH] for start in starts]
    return [{"input_ids": row, "labels": row} for row in rows]


def accuracy(model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    """The part of tokens that is predicted right, in fractions."""
    tokens = torch.stack([each["input_ids"] for each in data[:640]])
    with torch.no_grad():
        best = model(input_ids=tokens).logits.argmax(2)
    return float((best[:, :-1] == tokens[:, 1:]).float().mean())


def trained(make: Callable[[nn.Module], Optimizer], start: int) -> float:
    torch.manual_seed(start)
    data, model = sentences(STEPS * BATCH), gpt2()
    optimizer = make(model)
    scheduler = CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        tokens = torch.stack([each["input_ids"] for each in data[step * BATCH : (step + 1) * BATCH]])
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        scheduler.step()
    return accuracy(model, data)


def in_trainer(folder: Path, start: int) -> float:
    """The Trainer makes the optimizer and its own cosine schedule, as docs/trainers.md has it."""
    torch.manual_seed(start)
    data, model = sentences(STEPS * BATCH), gpt2()
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="cosine",
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )
    given = {"params": layer_groups(model), "lr": 3**-3, "base": "adam"}
    trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(FusedLayca, given))
    trainer.train()
    names = {name for group in trainer.optimizer.param_groups for name in group["param_names"]}
    assert names == {name for name, _ in model.named_parameters()}
    model.eval()
    return accuracy(model, data)


def test_gpt2_ends_where_adamw_does_by_groups_and_in_the_trainer(tmp_path: Path, seed: int) -> None:
    """Within a point, at the rate for short runs; the one for long runs, lr=None, is far from there."""
    theirs = trained(lambda model: AdamW(model.parameters(), lr=PLAIN_LR), seed)
    assert theirs > 0.8
    by_groups = trained(lambda model: FusedLayca(layer_groups(model), lr=3**-3, base="adam"), seed)
    assert by_groups >= theirs - 0.01
    assert in_trainer(tmp_path, seed) >= theirs - 0.01
    assert trained(lambda model: FusedLayca(layer_groups(model), base="adam"), seed) < theirs - 0.05
