"""The pure-PyTorch backend: runs wherever torch does, and needs nothing else.

``backend.py`` has the three verbs, ``pieces.py`` what they walk, ``arithmetic.py`` how the formulas are evaluated there
in few operations and no new memory, ``sums.py`` the sums in a fixed order.
"""

from .backend import BACKEND, TorchBackend
from .sums import row_sums

__all__ = ["BACKEND", "TorchBackend", "row_sums"]
