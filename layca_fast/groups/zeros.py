"""Layers of zeros in a model: trained with the others, or until they have a norm from which on they rotate."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..formulas.options import check_choice, check_joins_at
from ..state.layout import is_vector
from ..state.radii import starting_radii
from ..state.zeros import have_zero_layers

if TYPE_CHECKING:
    from .entries import Entry

#: What becomes of layers of zeros: they train as the others do, or until their norms have reached a stated value.
ZEROS = ("others", "rotate-later")


def check_zeros(zeros: Any, joins_at: Any) -> None:
    """Raise TypeError or ValueError for what becomes of layers of zeros that is no choice, or lacks its norm."""
    check_choice({"zeros": zeros}, "zeros", ZEROS)
    if joins_at is not None and zeros != "rotate-later":
        raise ValueError(
            f"joins_at={joins_at!r}: the norm from which on layers of zeros rotate: set zeros='rotate-later'"
        )
    if zeros == "rotate-later":
        if joins_at is None or joins_at == 0:
            raise ValueError(
                f"zeros='rotate-later' with joins_at={joins_at!r}: say from which norm on such layers rotate, as a "
                "number > 0, or as a function of a layer's shape"
            )
        check_joins_at(joins_at, "initial")


def set_aside_zeros(entries: "Sequence[Entry]", joins_at: Any) -> "list[Entry]":
    """Move tensors with a layer of zeros to the others, and return them. Waits once for each device.

    Unless they are to rotate later, from the norm ``joins_at`` on. What is known to start at zero is among them as long
    as it lives: made again on trained weights, the plan is the same.
    """
    layers = [entry for entry in entries if entry.chunks is not None or (entry.grows and not is_vector(entry.param))]
    zeros = have_zero_layers([(entry.param, entry.cut) for entry in layers])
    moved = [entry for entry, is_zero in zip(layers, zeros, strict=True) if is_zero]
    for entry in moved:
        if not entry.grows:
            entry.reason = "all zero" if entry.layers == 1 else f"one of its {entry.layers} layers is all zero"
        entry.chunks = entry.chunks if joins_at is not None else None
        entry.unknown = None
    if joins_at is None:
        return moved
    for entry in layers:
        if entry.grows or entry in moved:
            entry.chunks = 1 if entry.chunks is None else entry.chunks
            group = {"radius": "initial", "joins_at": joins_at}
            starts = starting_radii(entry.param, group, entry.cut, f"parameter {entry.name!r}") or (0.0,)
            # A number where it is one, which checkpoints keep: groups made again on trained weights follow it.
            entry.joins_at = -starts[0] if len(set(starts)) == 1 else joins_at
            entry.reason += "" if len(set(starts)) == 1 else f", other parts up to {-min(starts):.4g}"
            entry.joins_from = -max(starts)
    return []


def rotating_later(joins_at: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What more there is in the group of what rotates from a norm on: its radius is that norm, whatever others have."""
    if joins_at == 0:
        return {}
    given = not isinstance(options.get("radius", "initial"), str)
    return {"joins_at": joins_at, **({"radius": "initial"} if given else {})}
