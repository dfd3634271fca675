"""Drawing, and tables on the terminal."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def drawing() -> "Callable[..., Figure]":
    """:func:`layca_fast.figures.rotation.draw`; ImportError, saying how to get it, where matplotlib is missing."""
    try:
        from .rotation import draw
    except ImportError as error:
        raise ImportError(f'drawing needs matplotlib ({error}): pip install "layca_fast[monitor]"') from error
    return draw
