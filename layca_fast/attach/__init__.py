"""Layca on any other torch optimizer."""

from .handle import Handle, attach, detach

__all__ = ["Handle", "attach", "detach"]
