"""A small GPT over characters."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Causal self-attention: (rows, context, width) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # Three matrices rather than one packed: each is a layer that turns by itself, also where rows are sharded.
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, context, width = x.shape
        parts = (project(x).view(rows, context, self.heads, -1) for project in (self.query, self.key, self.value))
        query, key, value = (part.transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(rows, context, width))


class Block(nn.Module):
    """Attention and a network per character, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.contract(functional.gelu(self.expand(self.norm_2(x))))


class Head(nn.Module):
    """From the last hidden state to one logit per character. A type of its own, which ``layer_groups`` can be told."""

    def __init__(self, width: int, characters: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(characters, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class CharacterGPT(nn.Module):
    """Logits of the next character, (rows, context, characters), from the characters so far, (rows, context) int64."""

    def __init__(self, characters: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = Head(width, characters)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # A layer that turns keeps this norm for good, so it is one that neither shrinks nor grows what it maps.
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.characters(characters) + self.positions(torch.arange(characters.shape[1], device=characters.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy per character in nats, computed in float32."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
