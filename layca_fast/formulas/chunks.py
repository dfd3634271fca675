"""The option ``chunks``: which parts of a tensor are layers, each with a norm of its own. Its forms, and their checks.

1, n, "all"             equal slices of the first dimension; "all": one for each index
(2048, 512, 512)        slices of the first dimension, of these sizes
"matrices"              the last two dimensions, once for each index of those before them
("matrices", n)         the same, each matrix as n equal parts of its rows
"columns"               one for each index of the second dimension: the weights behind one input
("columns", n), ("columns", (2048, 512, 512))    slices of the second dimension, as above of the first
"""

from collections.abc import Sequence
from numbers import Integral
from operator import is_
from typing import Any

MATRICES, COLUMNS = "matrices", "columns"

#: What the option may be, once its sequences are tuples.
Chunks = int | str | tuple[Any, ...]

#: How a tensor is split along one dimension: in equal parts, in parts of these sizes, or one for each index ("all").
Split = int | str | tuple[int, ...]

_FORMS = (
    "must be a whole number >= 1, or 'all' (one layer per slice), sizes along the first dimension, such as "
    "(2048, 512, 512), 'matrices' or ('matrices', n) (the last two dimensions are a layer, or n layers), or 'columns', "
    "('columns', n) or ('columns', sizes) (the second dimension is cut)"
)


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 1


def _are_sizes(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(map(_is_count, value))


def _is_text(value: Any, *texts: str) -> bool:
    # Whatever else it is may compare in ways of its own, as arrays do.
    return isinstance(value, str) and value in texts


def check_chunks(chunks: Any) -> None:
    """Raise ValueError for a value of the option that is none."""
    if _is_count(chunks) or _are_sizes(chunks) or _is_text(chunks, "all", MATRICES, COLUMNS):
        return
    if isinstance(chunks, (tuple, list)) and len(chunks) == 2:
        kind, split = chunks
        if _is_text(kind, MATRICES, COLUMNS) and (_is_count(split) or (kind == COLUMNS and _are_sizes(split))):
            return
    raise ValueError(f"chunks={chunks!r}: {_FORMS}")


def as_tuples(value: Any) -> Any:
    """Lists as tuples, inside of others, too: what a group keeps can be compared, and changes as a whole only."""
    if not isinstance(value, (tuple, list)):
        return value
    made = tuple(map(as_tuples, value))
    return value if type(value) is tuple and all(map(is_, made, value)) else made


def parts_of(chunks: Chunks) -> tuple[str, Split]:
    """What is split, "rows", "matrices" or "columns", and how. ``chunks`` has been checked."""
    if isinstance(chunks, tuple) and isinstance(chunks[0], str):
        return chunks[0], as_tuples(chunks[1])
    if chunks == MATRICES:
        return MATRICES, 1
    if chunks == COLUMNS:
        return COLUMNS, "all"
    return "rows", as_tuples(chunks)


def check_chunk_names(names: Any, chunks: Any) -> None:
    """Raise TypeError or ValueError for names of parts that are none, or that ``chunks`` has no parts for."""
    if names is None:
        return
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise TypeError(f"chunk_names={names!r}: must be a list of names, one for each part that chunks cuts, or None")
    if len(set(names)) < len(names):
        raise ValueError(f"chunk_names={names!r}: has a name twice; name each part differently")
    split = parts_of(as_tuples(chunks))[1]
    count = len(split) if isinstance(split, tuple) else split
    if isinstance(count, int) and count > 1 and len(names) != count:
        raise ValueError(
            f"chunk_names={names!r}: are {len(names)} names, and chunks={chunks!r} cuts {count} parts: give one for "
            "each"
        )
