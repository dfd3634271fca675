"""Which tensors of a model are layers, decided by the modules that hold them."""

from .layer_groups import LayerGroups, layer_groups

__all__ = ["LayerGroups", "layer_groups"]
