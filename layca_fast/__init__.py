"""FusedLayca: rotation-controlled optimization for PyTorch (Layca, arXiv 1806.01603)."""

from .attach import Handle, attach, detach
from .backends import backends
from .figures import drawing
from .groups import LayerGroups, layer_groups
from .monitor import Curves, RotationMonitor
from .monitor.curves import draw_with
from .optimizer import FusedLayca
from .step.norms import NormDriftError, NormDrifts
from .step.stats import RotationStats
from .version import __version__

__all__ = [
    "Curves",
    "FusedLayca",
    "Handle",
    "LayerGroups",
    "NormDriftError",
    "NormDrifts",
    "RotationMonitor",
    "RotationStats",
    "__version__",
    "attach",
    "backends",
    "detach",
    "layer_groups",
]

draw_with(drawing)
