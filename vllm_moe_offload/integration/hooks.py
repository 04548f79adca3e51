"""Puts the wrappers around the seams. A wrapper does nothing in an engine that does not offload."""

from . import engine_config, flags, loading, step, weights, worker


def install() -> None:
    """Wrap all seams, once per process."""
    for module in (engine_config, flags, loading, step, weights, worker):
        module.install()
