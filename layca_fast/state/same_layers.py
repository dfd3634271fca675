"""Whether the layers of a checkpoint are those of the optimizer that loads it: a radius is the norm of one layer.

torch replaces the options of a group by those of the checkpoint, so chunks that were changed between two runs would
silently become those of before. A group that says nothing, chunks=1, follows the checkpoint, as with every option.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..formulas.chunks import as_tuples
from ..messages import describe
from .cut import cut_of
from .members import rotates
from .sharding import is_sharded

#: (saved group, label, parameter, saved state) of each parameter that has a saved state.
Pair = tuple[Mapping[str, Any], str, Tensor, Any]


def _has_radii(state: Any) -> bool:
    """Whether a saved state has norms that some step has set."""
    radius = state.get("radius") if isinstance(state, Mapping) else None
    if not isinstance(radius, Tensor):
        return False
    return is_sharded(radius) or bool(radius.any())


def check_same_layers(
    pairs: Iterable[Pair],
    present: Callable[[Tensor], Mapping[str, Any] | None],
    saved: Callable[[Mapping[str, Any]], Any],
) -> None:
    """Raise ValueError, naming them, for parameters that were saved as other layers than they are cut into here.

    ``present``: the options of a parameter before the checkpoint is loaded, None where it has none; ``saved``: the
    chunks of a saved group, None where it does not say.
    """
    others: dict[tuple[str, str, Any], list[str]] = {}
    for theirs, label, param, state in pairs:
        ours, then = present(param), as_tuples(saved(theirs))
        if ours is None or not rotates(param, ours) or not _has_radii(state):
            continue
        now = as_tuples(ours["chunks"])
        if now in (1, then):
            continue
        cut, count = cut_of(param, now, label), len(state["radius"])
        if then is None and count != cut.layers:
            others.setdefault((f"with {count} radii", "the chunks of that run", now), []).append(describe(label, param))
        elif then is not None and not cut.same_layers(cut_of(param, then, label)):
            others.setdefault((f"under chunks={then!r}", f"chunks={then!r}", now), []).append(describe(label, param))
    if others:
        ((saved_as, way_back, now), labels), *_ = others.items()
        raise ValueError(
            f"state_dict: {', '.join(labels)} was saved {saved_as}, and has chunks={now!r} here, so its radii are the "
            f"norms of other layers: give its group {way_back}. Or, to go on with other layers, "
            "take the 'radius' of each such parameter out of state_dict['state'], and set 'chunks' of its group in "
            "state_dict['param_groups']: norms are then taken from the weights"
        )
