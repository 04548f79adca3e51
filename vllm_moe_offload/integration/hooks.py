"""Puts the wrappers around the seams. A wrapper does nothing in an engine that does not offload."""

from . import engine_config, flags, loading, metrics, page, start_errors, step, tracing, weights, worker
from .cuda import allow_list, batch_v2, begin_pass, graphs, memory
from .log import log_through_vllm


def install() -> None:
    """Wrap all seams, once per process, and let what this package logs appear in vLLM's log."""
    log_through_vllm()
    ours = (engine_config, flags, loading, metrics, page, start_errors, step, tracing, weights, worker)
    for module in (*ours, allow_list, graphs, memory, batch_v2, begin_pass):
        module.install()
