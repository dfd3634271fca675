"""A real text that comes with Python, as numbers: the language reference behind ``help("FORMATTING")`` and the like."""

from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """``train`` and ``held_out``: (characters,) int64, each number the index of a character in ``vocabulary``."""

    vocabulary: str
    train: Tensor
    held_out: Tensor


def python_reference(held_out: float = 0.1) -> Text:
    """``pydoc_data.topics`` of this version of Python, half a million characters; its last part is held out."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    vocabulary = "".join(sorted(set(text)))
    number = {character: index for index, character in enumerate(vocabulary)}
    tokens = torch.tensor([number[character] for character in text])
    split = round(len(tokens) * (1 - held_out))
    return Text(vocabulary, tokens[:split], tokens[split:])


def batch(tokens: Tensor, rows: int, context: int, seed: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's part of a random batch: inputs and targets, (rows / ranks, context) int64.

    The whole batch follows from ``seed`` alone, so that a run sees the same data on any number of ranks. Raises
    ValueError if ``rows`` cannot be divided among them.
    """
    if rows % ranks != 0:
        raise ValueError(f"a batch of {rows} rows cannot be divided among {ranks} processes: choose a multiple of it")
    starts = torch.randint(len(tokens) - context, (rows,), generator=torch.Generator().manual_seed(seed))
    mine = starts.chunk(ranks)[rank]
    windows = tokens[mine.unsqueeze(1) + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]
