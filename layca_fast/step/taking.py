"""The part of a step that modifies: all of it, or none, or it says what it has left."""

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import TYPE_CHECKING

from ..state.modes import out_of_inference
from .backend import Backend
from .batch import Batch
from .interrupts import uninterrupted

if TYPE_CHECKING:
    from .together import Together

Pair = tuple[Backend, Batch]

#: Python looks for signals between its own operations, and so not between the calls of a loop that is C's.
_call = methodcaller("__call__")


def reserve(pairs: Sequence[Pair], together: "Together | None" = None) -> None:
    """Before anything is modified: take the memory that the step needs. Raises MemoryError where there is none."""
    try:
        with out_of_inference():
            for backend, batch in pairs:
                batch.make_room(backend)
            if together is not None:
                together.make_room()
    except MemoryError as error:
        raise MemoryError(
            "there is no memory for the step's tables; nothing was modified: free some, and step again"
        ) from error


def take(pairs: Sequence[Pair], settle: Callable[[Backend, Batch], None]) -> None:
    """Step every batch, and settle those that were stepped, also where something raises.

    Raises RuntimeError, which says so, where some of them have moved and others could not.
    """
    calls = []
    is_short = True
    for backend, batch in pairs:
        calls.append(batch.call(backend))
        is_short = is_short and not batch.is_delicate and backend.is_uninterrupted(batch)
    if is_short:
        _take_and_settle(pairs, calls, settle)
    else:
        with uninterrupted():
            _take_and_settle(pairs, calls, settle)


def _take_and_settle(
    pairs: Sequence[Pair], calls: Sequence[Callable[[], object]], settle: Callable[[Backend, Batch], None]
) -> None:
    taken: list[object] = []
    try:
        _take(pairs, calls, taken)
    finally:
        try:
            _settle(pairs[: len(taken)], settle)
        except BaseException:
            # Of what a signal may have interrupted, all may be done twice.
            _settle(pairs[: len(taken)], settle)
            raise


def _settle(pairs: Sequence[Pair], settle: Callable[[Backend, Batch], None]) -> None:
    for backend, batch in pairs:
        settle(backend, batch)


def _take(pairs: Sequence[Pair], calls: Sequence[Callable[[], object]], taken: list[object]) -> None:
    try:
        taken.extend(map(_call, calls))
    except Exception as error:
        # A signal that waited for compiled code to return has found the step whole.
        if len(taken) == len(pairs) or (not taken and pairs[0][0].is_native and pairs[0][1].is_one_call):
            raise
        count = sum(len(batch.slots) for _, batch in pairs[: len(taken)])
        rest = len(pairs[len(taken)][1].slots)
        raise RuntimeError(
            f"the step failed half-way: {count} tensors have taken it, and {rest} may have taken a part of it, so that "
            f"a second try would step them twice. Go on from a checkpoint. What failed: {type(error).__name__}: {error}"
        ) from error
