"""The trainable tensors of a model on their way into groups: what each is, and what moves it to the others."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..formulas.chunks import Chunks
from ..state.checks import check_initialized
from ..state.cut import Cut, cut_of
from ..state.layout import is_vector
from .others import head_of
from .place import Place, places_of
from .roles import Asked, asked_of, decide


@dataclass(eq=False)
class Entry:
    """One trainable tensor on its way into a group; ``chunks`` is None where it does not rotate.

    ``grows``: whether it is known to start at zero, also where it has left it. ``joins_at``: the norm from which on it
    rotates, or a function of a layer's shape, 0 where that is from the start; ``joins_from``: the least such norm.
    """

    name: str
    param: Tensor
    chunks: Chunks | None
    reason: str
    unknown: type[nn.Module] | None = None
    parts: tuple[str, ...] = ()
    grows: bool = False
    joins_at: Any = 0.0
    joins_from: float = 0.0

    @property
    def layers(self) -> int:
        return 1 if self.chunks is None else self.cut.layers

    @property
    def cut(self) -> Cut:
        """How it is cut into layers, where it rotates; ValueError where its chunks do not fit."""
        return cut_of(self.param, 1 if self.chunks is None else self.chunks, f"parameter {self.name!r}")


def trainable_entries(model: nn.Module, asked: Asked) -> tuple[dict[Tensor, str], list[Entry]]:
    """Every trainable parameter with its name, and those that can be placed, in the order of definition.

    A parameter can be placed if a module registers it and ``model.named_parameters()`` yields it, too.
    """
    names: dict[Tensor, str] = {}
    for name, param in model.named_parameters():
        names.setdefault(param, name)
    owners: dict[Tensor, list[tuple[Place, str]]] = {}
    places = places_of(model)
    trainable: dict[Tensor, str] = {param: name for param, name in names.items() if param.requires_grad}
    for prefix, module in model.named_modules():
        # Not the module's own method, which a model may override.
        for leaf, param in nn.Module.named_parameters(module, recurse=False, remove_duplicate=False):
            if param.requires_grad:
                owners.setdefault(param, []).append((places[module], leaf))
                trainable.setdefault(param, f"{prefix}.{leaf}" if prefix else leaf)
    if not trainable:
        raise ValueError(f"model: no parameter of this {type(model).__name__} requires a gradient: nothing to train")
    for tensor, name in trainable.items():
        check_initialized(tensor, f"parameter {name!r}")
    placed = {param: names[param] for param in owners if param in names}
    return trainable, [Entry(name, param, *decide(owners[param], param, asked)) for param, name in placed.items()]


def decide_on_head(entries: Sequence[Entry], model: nn.Module, asked: Asked, head: bool | None, last: bool) -> None:
    """Move the head to the others, or have it rotate; unless the caller has said of its module what is to happen.

    ``last``: whether the last Linear of a model without a vocabulary is a head, too.
    """
    logits = head_of(model, any_last=last)
    owners = [module for module in model.modules() if any(param is logits for param in module._parameters.values())]
    decided = [chunks for was_asked, chunks in (asked_of(each, asked) for each in owners) if was_asked]
    if decided and (head is not True or False in decided):
        return
    for entry in entries:
        if entry.param is not logits:
            continue
        tied = entry.reason == "embedding"
        if head is True:
            if entry.chunks is None:
                entry.chunks, entry.reason, entry.unknown = 1, "logits and embedding" if tied else "logits", None
        elif entry.chunks is not None or entry.unknown is not None or tied:
            entry.chunks, entry.unknown, entry.parts = None, None, ()
            entry.reason = "embedding and logits" if tied else "logits"


def set_aside_vectors(entries: Iterable[Entry]) -> None:
    """Move tensors of one row or one column, as the gains of weight_norm are, to the others."""
    for entry in entries:
        if entry.chunks is not None and is_vector(entry.param):
            entry.chunks, entry.reason = None, "vector"
