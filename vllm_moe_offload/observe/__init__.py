"""Plain numbers about what happened. It must never influence what happens."""

from .counters import Counters

__all__ = ["Counters"]
