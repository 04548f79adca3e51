"""Says in vLLM's log, once, that chunked prefill is cut so small that reading experts takes longer than computing."""

import time

from vllm.logger import init_logger

from ..observe import Counters

logger = init_logger("vllm.moe_offload")


class ChunkReport:
    """Looks at the steps that are as long as the scheduler makes them: their prompts are continued in the next step.

    Every such step reads the experts of all layers again, so longer ones read less per token.

    Args:
        counters: of the model's runtime.
        most_tokens: what the engine schedules at most for one step: vLLM's ``max_num_batched_tokens``.
    """

    def __init__(self, counters: Counters, most_tokens: int):
        self._counters = counters
        self._most_tokens = most_tokens
        self._began = 0.0
        self._stalled = 0.0
        self._watches = False
        self._said = False

    def begin_step(self, tokens: int) -> None:
        """A step of so many tokens starts."""
        self._watches = tokens >= self._most_tokens and not self._said
        if self._watches:
            self._began, self._stalled = time.perf_counter(), self._counters.stall_seconds

    def end_step(self) -> None:
        """The forward pass of the step is over."""
        if not self._watches:
            return
        self._watches = False
        seconds = time.perf_counter() - self._began
        stalled = self._counters.stall_seconds - self._stalled
        if stalled > seconds / 2:
            self._said = True
            logger.info(
                "moe-offload: a prefill step of %d tokens waited for experts for %.2f of %.2f s; steps of more tokens "
                "read experts less often: raise --max-num-batched-tokens (now %d)",
                self._most_tokens,
                stalled,
                seconds,
                self._most_tokens,
            )
