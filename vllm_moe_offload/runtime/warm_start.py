"""Which experts requests that begin are going to use most: those that similar earlier requests used, layer by layer.

As FineMoE's search by the semantic embedding of a prompt (Yu et al., 2025), over whole requests.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..prefetch.optional import optional
from ..trace.history import HistoryStore, PastRequest
from ..trace.trace import DECODE, Trace
from .tracer import Batch, RoutingTracer

NEAREST = 8
"""Earlier requests that each new one is compared with."""
_MOST_REQUESTS = 4
"""That begin with one step: a search takes up to milliseconds, and the step waits for it."""
_MOST_TOKENS = 256
"""Of each earlier request, so many of its first generated tokens count."""
_LEAST = 2.0
"""An expert that is worth a slot is used so many times as often as all on the average."""


class WarmStart:
    """Searches the history of one model.

    Args:
        history: is only read, as it is at the time.
        tracer: of the model's requests; nothing is searched any more once it is switched off.
    """

    def __init__(self, history: HistoryStore, tracer: RoutingTracer):
        self._history, self._tracer = history, tracer
        self.switch = tracer.switch

    @optional
    def experts_for(self, batch: Batch, slots: Sequence[int]) -> list[NDArray[np.int32]] | None:
        """What requests that begin with ``batch`` are likely to use, by layer, the most likely first.

        Args:
            slots: of each layer. Requests that begin get a share by their number among all of the batch.

        Returns:
            None where none begins, or the history says nothing of them by now.
        """
        prompts = batch.new_prompts()
        if not prompts or not self._history.num_requests:
            return None
        embeddings = [
            self._tracer.embed(request, np.array(prompt, np.int32))
            for request, prompt in list(prompts.items())[:_MOST_REQUESTS]
        ]
        share = len(embeddings) / max(len(batch.scheduled), len(embeddings))
        wanted = self.experts(embeddings, [int(count * share) for count in slots])
        return wanted if any(map(len, wanted)) else None

    def experts(
        self, embeddings: Sequence[NDArray[np.float32] | None], counts: Sequence[int]
    ) -> list[NDArray[np.int32]]:
        """By layer the experts that requests with these prompt embeddings are likely to use, best first.

        Args:
            counts: by layer, how many at most.
        """
        shape = self._history.shape
        frequency = np.zeros(shape[:2], np.float32)
        for embedding in embeddings:
            for past in self._nearest(embedding):
                frequency += expert_frequency(past.trace) / (NEAREST * len(embeddings))
        return [_best(used, count, _LEAST * shape[2] / shape[1]) for used, count in zip(frequency, counts, strict=True)]

    def _nearest(self, embedding: NDArray[np.float32] | None) -> list[PastRequest]:
        """What is found at once: what comes later comes too late."""
        if embedding is None:
            return []
        answers: list[list[PastRequest]] = []
        self._history.seek(embedding, NEAREST, answers.append)
        return answers[0] if answers else []


def expert_frequency(trace: Trace) -> NDArray[np.float32]:
    """``[L, E]``: the share of the generated tokens of one request that used each expert; of all if none was."""
    layers, experts, _ = trace.shape
    chosen = trace.experts
    if trace.phase is not None and (trace.phase == DECODE).any():
        chosen = chosen[trace.phase == DECODE]
    chosen = chosen[:_MOST_TOKENS].astype(np.int64)
    flat = chosen + np.arange(0, layers * experts, experts)[:, None]
    used = np.bincount(flat.reshape(-1), minlength=layers * experts).reshape(layers, experts)
    share: NDArray[np.float32] = (used / max(1, len(chosen))).astype(np.float32)
    return share


def _best(frequency: NDArray[np.float32], count: int, least: float) -> NDArray[np.int32]:
    order = np.argsort(-frequency, kind="stable")[: max(0, count)].astype(np.int32)
    best: NDArray[np.int32] = order[frequency[order] >= least]
    return best
