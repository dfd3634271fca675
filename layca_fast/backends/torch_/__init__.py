"""The pure-PyTorch backend: runs wherever torch does, and needs nothing else.

``backend.py`` has the three verbs, ``runs.py`` which tensors they take together, ``run.py`` and ``pieces.py`` what one
operation works on, ``base.py`` the base steps, ``arithmetic.py`` and ``memory.py`` how their formulas are evaluated
without new memory, ``cleaning.py`` what is not finite, ``sums.py`` the sums in a fixed order.
"""

from .backend import BACKEND, TorchBackend
from .sums import row_sums

__all__ = ["BACKEND", "TorchBackend", "row_sums"]
