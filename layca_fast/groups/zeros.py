"""Layers of zeros in a model: trained with the others, or until they have a norm from which on they rotate."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..formulas.options import check_choice, check_joins_at
from ..state.radii import starting_radii
from ..state.zeros import have_zero_layers

if TYPE_CHECKING:
    from .layer_groups import _Entry

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


def set_aside_zeros(entries: "Sequence[_Entry]", joins_at: Any) -> "list[_Entry]":
    """Move tensors with a layer of zeros to the others, and return them. Waits once for each device.

    Unless they are to rotate later, from the norm ``joins_at`` on.
    """
    rotating = [entry for entry in entries if entry.chunks is not None]
    zeros = have_zero_layers([(entry.param, entry.cut) for entry in rotating])
    moved = [entry for entry, is_zero in zip(rotating, zeros, strict=True) if is_zero]
    for entry in moved:
        entry.reason = "all zero" if entry.layers == 1 else f"one of its {entry.layers} layers is all zero"
        if joins_at is None:
            entry.chunks = entry.unknown = None
        else:
            # As a number, which checkpoints keep: groups that are made again on trained weights follow it.
            group = {"radius": "initial", "joins_at": joins_at}
            starts = starting_radii(entry.param, group, entry.cut, f"parameter {entry.name!r}") or (0.0,)
            entry.joins_at = -starts[0]
    return moved if joins_at is None else []


def rotating_later(joins_at: float, options: Mapping[str, Any]) -> dict[str, Any]:
    """What more there is in the group of what rotates from a norm on: its radius is that norm, whatever others have."""
    if joins_at == 0:
        return {}
    given = not isinstance(options.get("radius", "initial"), str)
    return {"joins_at": joins_at, **({"radius": "initial"} if given else {})}
