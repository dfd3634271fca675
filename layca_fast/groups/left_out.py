"""What layer_groups warns of: nothing that rotates, or large matrices in modules that it does not know."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..state.layout import is_vector

#: The part of the weights that may be left out before it is worth a word: position embeddings and the like are less.
SPARED = 0.1


def doubt(model: nn.Module, turning: int, unknown: Sequence[tuple[type[nn.Module], Tensor]]) -> str | None:
    """What to warn of; ``turning``: how many weights rotate; ``unknown``: tensors that nobody has decided on."""
    counts: dict[type[nn.Module], list[int]] = {}
    for kind, tensor in unknown:
        if not is_vector(tensor):
            counts.setdefault(kind, []).append(tensor.numel())
    weights = sum(map(sum, counts.values()))
    if turning > 0 and weights <= SPARED * (turning + weights):
        return None
    name = type(model).__name__
    if not counts:
        return (
            f"layer_groups: no layer of this {name} rotates: what it trains are biases, norm layers, embeddings and "
            "the like, which take plain base steps; embeddings=True makes embeddings rotate"
        )
    held = ", ".join(f"{kind.__name__} ({len(sizes)} with {sum(sizes):,} weights)" for kind, sizes in counts.items())
    names = ", ".join(kind.__name__ for kind in counts)
    ahead = "no layer" if turning == 0 else f"{weights / (turning + weights):.0%} of the weights in matrices"
    verb = "rotates" if turning == 0 else "do not rotate"
    return (
        f"layer_groups: {ahead} of this {name} {verb}, for their module types are unknown: {held}. Make them rotate "
        f"with rotate=[{names}], or rotate={{{next(iter(counts)).__name__}: n}} where each tensor packs n layers, "
        "or with False for n to leave them as they are"
    )
