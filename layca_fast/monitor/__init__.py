"""Layer rotation curves of any training: what is watched, what is kept of its start, and what came of it."""

from .curves import Curves
from .rotation_monitor import RotationMonitor

__all__ = ["Curves", "RotationMonitor"]
