"""A forward pass as this plugin sees it: its experts come into slots, and what it routed to is traced.

It must never import vLLM or torch, nor let tracing or prefetching change what a step computes.
"""

from .routing_queue import RoutingQueue
from .runtime import OffloadRuntime, PooledLayer
from .tracer import Batch, RoutingTracer
from .warm_start import WarmStart
from .wave import Wave, Waves

__all__ = ["Batch", "OffloadRuntime", "PooledLayer", "RoutingQueue", "RoutingTracer", "WarmStart", "Wave", "Waves"]
