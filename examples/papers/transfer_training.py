"""One training of the character GPT for transfer.py: its setting, and the CSV's row that it becomes."""

import argparse
import math
import platform
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

sys.path.append(str(Path(__file__).parents[1]))

from lm_data import Text, batch, python_reference
from lm_model import CharacterGPT, loss_of
from result_rows import made_with
from train_lm import OTHERS_RATE, WEIGHT_DECAY, make_optimizer

from layca_fast import layer_groups

#: Names as in train_lm.py, and what tables and figures call them. All but the first leave embeddings, norms and head to
#: Adam at one rate that is never changed, and differ in the hidden matrices alone.
OPTIMIZERS = {
    "adamw": "AdamW, one rate",
    "adamw-hidden": "AdamW, hidden matrices",
    "layca": "Layca, Adam's direction",
    "hyperball": "Hyperball, Adam's direction",
    "muon": "Muon",
    "muon-layca": "Layca, Muon's direction",
    "muon-hyperball": "Hyperball, Muon's direction",
}

#: The text is that of this version.
PYTHON = ".".join(platform.python_version_tuple()[:2])

#: Batches of the held-out text that a model is judged by.
HELD_OUT_BATCHES = 8


@dataclass(frozen=True)
class Setting:
    """What a rate is searched for. ``scale`` multiplies the hidden matrices' initial weights."""

    optimizer: str
    width: int = 32
    depth: int = 2
    steps: int = 300
    warm_up: bool = True
    scale: float = 1.0
    heads: int = 4
    context: int = 64
    batch: int = 16


@dataclass(frozen=True)
class Row:
    """A training. ``lr`` is the power of 2, ``held_out`` nats per character of the text of this ``python``."""

    optimizer: str
    width: int
    depth: int
    steps: int
    warm_up: bool
    scale: float
    heads: int
    context: int
    batch: int
    lr: float
    seed: int
    python: str
    held_out: float
    date: str = ""
    layca_fast: str = ""
    torch: str = ""

    def setting(self) -> Setting:
        """What its rate was tried for."""
        return Setting(**{field.name: getattr(self, field.name) for field in fields(Setting)})


def row_of(setting: Setting, lr: float, seed: int) -> Row:
    """Without an outcome."""
    return Row(**asdict(setting), lr=float(lr), seed=seed, python=PYTHON, held_out=math.nan)


@cache
def text() -> Text:
    """Half a million characters."""
    return python_reference()


def factor(step: int, steps: int, warm_up: bool) -> float:
    """What rates are multiplied by: half a cosine down to 0, after a rise in the first twentieth if ``warm_up``."""
    rise = max(1, steps // 20) if warm_up else 1
    progress = max(0, step + 1 - rise) / max(1, steps - rise)
    return min((step + 1) / rise, (1 + math.cos(math.pi * progress)) / 2)


def hidden_adamw(model: nn.Module, lr: float) -> Optimizer:
    """AdamW at ``lr`` on the tensors that FusedLayca would turn, and on the others what FusedLayca gives them."""
    groups = [
        {
            "params": group["params"],
            "lr": lr if group["rotate"] else OTHERS_RATE,
            "weight_decay": WEIGHT_DECAY if group["rotate"] else 0.0,
        }
        for group in layer_groups(model, head=False)
    ]
    return AdamW(groups, betas=(0.9, 0.95))


def start(setting: Setting, lr: float, seed: int) -> tuple[CharacterGPT, Optimizer]:
    """The model before its first step, and its optimizer at the peak rate."""
    torch.manual_seed(seed)
    model = CharacterGPT(len(text().vocabulary), setting.context, setting.width, setting.heads, setting.depth)
    with torch.no_grad():
        for param in model.blocks.parameters():
            if param.dim() >= 2:
                param.mul_(setting.scale)
    if setting.optimizer == "adamw-hidden":
        return model, hidden_adamw(model, lr)
    options = argparse.Namespace(lr=lr, rotate_embeddings=False, rotate_head=False, in_backward=False)
    return model, make_optimizer(setting.optimizer, model, options)


def train(setting: Setting, power: float, seed: int) -> Row:
    """From the first step to the last, at a peak rate of 2**power. A loss that is not finite counts as infinite."""
    model, optimizer = start(setting, 2.0**power, seed)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    size = (setting.batch, setting.context)
    for step in range(setting.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step, setting.steps, setting.warm_up)
        optimizer.zero_grad()
        inputs, targets = batch(text().train, *size, seed + 1 + step)
        loss = loss_of(model(inputs), targets)
        if not loss.isfinite():
            break
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        pairs = [batch(text().held_out, *size, seed + number) for number in range(HELD_OUT_BATCHES)]
        loss = torch.stack([loss_of(model(inputs), targets) for inputs, targets in pairs]).mean().item()
    rounded = float(f"{loss:.6g}") if math.isfinite(loss) else math.inf
    return replace(row_of(setting, power, seed), held_out=rounded, **made_with())
