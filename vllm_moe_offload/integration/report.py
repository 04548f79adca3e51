"""Says in vLLM's log what offloading has been doing, and what would make it faster."""

import time
from dataclasses import replace

from vllm.logger import init_logger

from ..sizes import size_text
from ..stats import STATISTICS, Number, Statistic, Stats

logger = init_logger(__name__)

SECONDS_BETWEEN_LINES = 60.0

_SHOWN = tuple(each for each in STATISTICS if each.phrase)


class StatsReport:
    """One line for every period in which experts were used.

    Args:
        stats: of the model's runtime.
        owner: whose experts, as it stands before that word; empty for the served model's.
    """

    def __init__(self, stats: Stats, owner: str = ""):
        self._stats = stats
        self._owner = owner
        self._since = time.monotonic()
        self._before = replace(stats)

    def maybe_log(self, prediction: str) -> None:
        """Log the last period if it is over. ``prediction``: what it does now."""
        now = time.monotonic()
        if now - self._since < SECONDS_BETWEEN_LINES:
            return
        stats, before = self._stats, self._before
        hits, misses = stats.hits - before.hits, stats.misses - before.misses
        if hits + misses:
            logger.info(
                "%.1f%% of %d %sexperts were in fast memory; %s; prediction is %s",
                100 * hits / (hits + misses),
                hits + misses,
                self._owner,
                ", ".join(self._text(each, now - self._since) for each in _SHOWN),
                prediction,
            )
        self._since, self._before = now, replace(stats)

    def _text(self, statistic: Statistic, seconds: float) -> str:
        """What a period of so many seconds did to a counter, or what a gauge shows at its end."""
        value: Number = getattr(self._stats, statistic.name)
        if statistic.kind == "gauge":
            return f"{value} {statistic.unit} {statistic.phrase}"
        difference = value - getattr(self._before, statistic.name)
        if statistic.unit == "bytes":
            return f"{size_text(difference / seconds)}/s {statistic.phrase}"
        if statistic.unit == "seconds":
            return f"{100 * difference / seconds:.0f}% {statistic.phrase}"
        return f"{difference} {statistic.phrase}"


class ChunkReport:
    """Says once that chunked prefill is cut so small that reading experts takes longer than computing.

    Looks at the steps that are as long as the scheduler makes them: their prompts are continued in the next step.

    Every such step reads the experts of all layers again, so longer ones read less per token.

    Args:
        stats: of the model's runtime.
        most_tokens: what the engine schedules at most for one step: vLLM's ``max_num_batched_tokens``.
    """

    def __init__(self, stats: Stats, most_tokens: int):
        self._stats = stats
        self._most_tokens = most_tokens
        self._began = 0.0
        self._stalled = 0.0
        self._watches = False
        self._said = False

    def begin_step(self, tokens: int) -> None:
        """A step of so many tokens starts."""
        self._watches = tokens >= self._most_tokens and not self._said
        if self._watches:
            self._began, self._stalled = time.perf_counter(), self._stats.stall_seconds

    def end_step(self) -> None:
        """The forward pass of the step is over."""
        if not self._watches:
            return
        self._watches = False
        seconds = time.perf_counter() - self._began
        stalled = self._stats.stall_seconds - self._stalled
        if stalled > seconds / 2:
            self._said = True
            logger.info(
                "a prefill step of %d tokens waited for experts for %.2f of %.2f s; steps of more tokens "
                "read experts less often: raise --max-num-batched-tokens (now %d)",
                self._most_tokens,
                stalled,
                seconds,
                self._most_tokens,
            )
