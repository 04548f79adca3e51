"""Puts the wrappers around the seams. Every wrapper first asks whether this engine offloads, and if not steps aside."""

from . import engine_config, flags, loading, step, weights, worker


def install() -> None:
    """Wrap all seams, once per process."""
    for module in (engine_config, flags, loading, step, weights, worker):
        module.install()
