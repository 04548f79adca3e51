"""Pools of slots as a forward pass uses them: hold the experts it reads, bring in those it lacks."""

from .base import Hold, SlotPool, Span
from .embedded import embedded_pools

__all__ = ["Hold", "SlotPool", "Span", "embedded_pools"]
