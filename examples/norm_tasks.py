"""What fixed_norm.py trains: a network on digits, with and without normalisation and rescaled, and small GPTs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from lm_data import batch, python_reference
from lm_model import CharacterGPT, loss_of
from torch import Tensor, nn
from torch.nn import functional

from layca_fast.state.layout import is_vector


@dataclass(frozen=True)
class Score:
    """``metric`` is what the task is about, larger being better; ``loss`` the mean cross-entropy in nats."""

    metric: float
    loss: float


class Task(ABC):
    """A training, and the three parts of its data: "train", "validation", "test".

    ``follow_step``: whether norms that follow the base step are shown beside the others, at their rate.
    ``needs``: a package beside those of the extra "demo".
    ``powers``: the learning rates to begin the search with, as powers of 3, for AdamW and for the others.
    ``search_all``: whether the rate is chosen with all seeds, or with the first, as larger models make sensible.
    """

    name: str
    metric: str
    steps: int
    powers: tuple[Sequence[int], Sequence[int]]
    search_all: bool
    needs: str = ""
    follow_step: bool = False

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """A new one."""

    @abstractmethod
    def head(self, model: nn.Module) -> list[nn.Parameter]:
        """The tensors to take off the sphere: the last layer and, in language models, the embeddings."""

    @abstractmethod
    def loss(self, model: nn.Module, seed: int, step: int) -> Tensor:
        """Of the batch of that step, 0-d."""

    @abstractmethod
    def score(self, model: nn.Module, seed: int, part: str) -> Score:
        """Of a part of the data."""


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images in [0, 1], (1797, 64) float32, and labels, (1797,) int64, that come with scikit-learn."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels, dtype=torch.int64)


class Digits(Task):
    """A network of Linear 64-128-128-10 with ReLU and torch's initialisation, its matrices times ``scale``."""

    metric = "accuracy"
    powers = ((-3, -4, -5, -6), (-2, -3, -4, -5))
    search_all = True

    def __init__(self, name: str, norm: bool = False, scale: float = 1.0, epochs: int = 30, rows: int = 64) -> None:
        self.name, self.norm, self.scale, self.rows = name, norm, scale, rows
        self.follow_step = norm
        self._epoch = 1097 // rows
        self.steps = epochs * self._epoch

    @staticmethod
    @cache
    def parts(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Images and labels of 1097, 300 and 400 digits, drawn anew for every seed."""
        images, labels = digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).split([1097, 300, 400])
        return {name: (images[i], labels[i]) for name, i in zip(("train", "validation", "test"), order, strict=True)}

    @staticmethod
    @lru_cache(maxsize=1)
    def order(seed: int, epoch: int) -> Tensor:
        """In which an epoch goes through what it trains on."""
        return torch.randperm(1097, generator=torch.Generator().manual_seed(1000 * (seed + 1) + epoch))

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for inputs in (64, 128):
            modules += [nn.Linear(inputs, 128), *([nn.BatchNorm1d(128)] if self.norm else []), nn.ReLU()]
        model = nn.Sequential(*modules, nn.Linear(128, 10))
        with torch.no_grad():
            for param in model.parameters():
                if not is_vector(param):
                    param.mul_(self.scale)
        return model

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        return [model[-1].weight]

    def loss(self, model: nn.Module, seed: int, step: int) -> Tensor:
        images, labels = self.parts(seed)["train"]
        epoch, place = divmod(step, self._epoch)
        rows = self.order(seed, epoch)[place * self.rows : (place + 1) * self.rows]
        return functional.cross_entropy(model(images[rows]), labels[rows])

    @torch.no_grad()
    def score(self, model: nn.Module, seed: int, part: str) -> Score:
        images, labels = self.parts(seed)[part]
        logits = model.eval()(images)
        model.train()
        hits = (logits.argmax(1) == labels).double().mean().item()
        return Score(hits, functional.cross_entropy(logits, labels).item())


class Characters(Task):
    """A GPT over the characters of Python's reference: 64 of context, 16 rows a batch."""

    metric = "loss"
    search_all = False
    context, rows = 64, 16

    def __init__(
        self,
        name: str,
        steps: int,
        make: Callable[[int], nn.Module],
        heads: Sequence[str],
        powers: tuple[Sequence[int], Sequence[int]] = ((-4, -5), (-3, -4)),
        needs: str = "",
    ) -> None:
        self.name, self.steps, self._make, self._heads = name, steps, make, heads
        self.powers, self.needs = powers, needs

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self._make(len(python_reference().vocabulary))

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        return [model.get_parameter(name) for name in self._heads]

    @staticmethod
    @cache
    def parts() -> dict[str, Tensor]:
        """Characters: the held-out tenth is half for validation, half for the test."""
        text = python_reference()
        validation, test = text.held_out.chunk(2)
        return {"train": text.train, "validation": validation, "test": test}

    def _loss(self, model: nn.Module, part: str, seed: int) -> Tensor:
        inputs, targets = batch(self.parts()[part], self.rows, self.context, seed)
        output = model(inputs)
        return loss_of(getattr(output, "logits", output), targets)

    def loss(self, model: nn.Module, seed: int, step: int) -> Tensor:
        return self._loss(model, "train", 10_000 * (seed + 1) + step)

    @torch.no_grad()
    def score(self, model: nn.Module, seed: int, part: str) -> Score:
        losses = [self._loss(model, part, number).item() for number in range(16)]
        loss = math.fsum(losses) / len(losses)
        return Score(-loss, loss)


def character_gpt(width: int, steps: int = 300) -> Characters:
    """The model of train_lm.py."""

    def make(characters: int) -> nn.Module:
        return CharacterGPT(characters, Characters.context, width, heads=4, layers=2)

    name = f"GPT, width {width}" + ("" if steps == 300 else f", {steps} steps")
    return Characters(name, steps, make, ["head.weight", "characters.weight", "positions.weight"])


def gpt2() -> Characters:
    """transformers' GPT-2, tiny and with random weights; its head is its embedding."""

    def make(characters: int) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"vocab_size": characters, "n_positions": Characters.context, "n_embd": 64, "n_layer": 2, "n_head": 4}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(**sizes, **off))

    heads = ["transformer.wte.weight", "transformer.wpe.weight"]
    return Characters("GPT-2 of transformers", 150, make, heads, ((-3, -4, -5), (-2, -3, -4, -5)), "transformers")


#: By the name that ``--only`` knows.
TASKS: dict[str, Task] = {
    "mlp": Digits("MLP"),
    "batchnorm": Digits("MLP with BatchNorm", norm=True),
    "small": Digits("MLP, initial weights x 1/4", scale=0.25),
    "large": Digits("MLP, initial weights x 4", scale=4.0),
    "gpt2": gpt2(),
    **{f"gpt{width}": character_gpt(width) for width in (32, 64, 128)},
    **{f"steps{steps}": character_gpt(32, steps) for steps in (75, 1200)},
}
