"""Puts the wrappers around the seams. A wrapper does nothing in an engine that does not offload."""

from . import engine_config, flags, loading, step, weights, worker
from .cuda import allow_list, batch_v2, graphs, memory
from .log import log_through_vllm


def install() -> None:
    """Wrap all seams, once per process, and let what this package logs appear in vLLM's log."""
    log_through_vllm()
    for module in (engine_config, flags, loading, allow_list, graphs, memory, step, weights, worker, batch_v2):
        module.install()
