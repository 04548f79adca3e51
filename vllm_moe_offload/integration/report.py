"""Says in vLLM's log, now and then, what offloading has been doing."""

import time
from dataclasses import replace

from vllm.logger import init_logger

from ..runtime import OffloadRuntime

logger = init_logger("vllm.moe_offload")

SECONDS_BETWEEN_LINES = 10.0


class StatsReport:
    """One line for every period in which experts were used.

    Args:
        owner: whose experts, as it stands before that word; empty for the served model's.
    """

    def __init__(self, runtime: OffloadRuntime, owner: str = ""):
        self._owner = owner
        self._runtime = runtime
        self._since = time.monotonic()
        self._before = replace(runtime.counters)

    def maybe_log(self) -> None:
        """Log the last period if it is over."""
        now = time.monotonic()
        if now - self._since < SECONDS_BETWEEN_LINES:
            return
        counters, before = self._runtime.counters, self._before
        hits, misses = counters.hits - before.hits, counters.misses - before.misses
        if hits + misses:
            logger.info(
                "moe-offload: %.1f%% of %d %sexperts were in fast memory; %.1f MiB/s loaded, %.0f%% of the time stalled"
                "; prefetched %d useful, %d late, %d wasted",
                100 * hits / (hits + misses),
                hits + misses,
                self._owner,
                (counters.loaded_bytes - before.loaded_bytes) / 2**20 / (now - self._since),
                100 * (counters.stall_seconds - before.stall_seconds) / (now - self._since),
                counters.prefetch_useful - before.prefetch_useful,
                counters.prefetch_late - before.prefetch_late,
                counters.prefetch_wasted - before.prefetch_wasted,
            )
        self._since, self._before = now, replace(counters)
