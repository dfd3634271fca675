"""What a new optimizer warns of: groups in which nothing rotates, and what a vocabulary seems to have."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..messages import describe, labelled
from .members import rotates

#: Matrices of so many rows, and of so many times as many as columns, are embeddings or the heads of a vocabulary: the
#: widest hidden layers of published models have up to 53,248 rows, and at most 3.5 times as many as columns.
VOCABULARY, OBLONG = 2**14, 3.75


def _is_left_to_us(group: Mapping[str, Any]) -> bool:
    return group["rotate"] is None


def _seems_of_a_vocabulary(param: Tensor) -> bool:
    return param.dim() == 2 and param.shape[0] >= max(VOCABULARY, OBLONG * param.shape[1]) and param.shape[1] > 1


def nothing_rotates(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """What to warn of, if no tensor rotates though nobody has asked for that."""
    if any(rotates(param, group) for group, _, param in labelled(groups)) or not all(map(_is_left_to_us, groups)):
        return None
    return (
        f"nothing rotates: none of the {sum(len(group['params']) for group in groups)} parameters has two or more "
        "dimensions longer than 1, so all take plain base steps. Pass the weights of the layers, too, or rotate=False "
        "to silence this"
    )


def vocabulary_rotates(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """What to warn of, if by default a tensor rotates that seems to be an embedding or the head of a vocabulary."""
    for group, label, param in labelled(groups):
        if _is_left_to_us(group) and _seems_of_a_vocabulary(param):
            return (
                f"{describe(label, param)} seems to be an embedding, or the head of a vocabulary. It rotates, so its "
                "norm stays what initialization made it, and the logits with it. Pass layer_groups(model), which keeps "
                "embeddings out, put it in a group with rotate=False, or with rotate=True to silence this"
            )
    return None
