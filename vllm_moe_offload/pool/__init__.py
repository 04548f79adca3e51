"""Pools of slots as a forward pass uses them: hold the experts it reads, bring in those it lacks.

It must never overwrite a slot that a running forward pass may read, nor let a speculative load delay a demand.
"""

from .base import Hold, HostPool, SlotPool, Span
from .local import local_pools
from .memory import HostMemory

__all__ = ["Hold", "HostMemory", "HostPool", "SlotPool", "Span", "local_pools"]
