"""Which tensors of a model are layers, decided by the modules that hold them."""

from .layer_groups import layer_groups
from .plan import LayerGroups

__all__ = ["LayerGroups", "layer_groups"]
