"""A forward pass as this plugin sees it: its experts come into slots, and what it routed to is traced.

It must never import vLLM or torch, nor let tracing or prefetching change what a step computes.
"""

from .runtime import OffloadRuntime, PooledLayer
from .tracer import Batch, RoutingTracer
from .wave import Wave, Waves

__all__ = ["Batch", "OffloadRuntime", "PooledLayer", "RoutingTracer", "Wave", "Waves"]
