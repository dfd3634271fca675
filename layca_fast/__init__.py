"""FusedLayca: rotation-controlled optimization for PyTorch (Layca, arXiv 1806.01603)."""

from .backends import backends
from .optimizer import FusedLayca
from .stats import RotationStats

__all__ = ["FusedLayca", "RotationStats", "__version__", "backends"]

__version__ = "0.1.0"
