"""Traces what the tokens of every step are routed to, request by request, until a request ends.

It must never change what a step computes, and does nothing at all in passes that serve no request (warm-up, profiling).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..predict.base import RequestState
from ..prefetch.optional import Switch, optional
from ..trace.prompt_embedding import unit
from ..trace.recorder import Recorder, RequestMaps, ScheduledTokens
from ..trace.trace import Trace

Vector = NDArray[np.float32]


class Batch:
    """One scheduled step. This one knows nothing of the requests that its tokens belong to.

    Args:
        tokens: scheduled; 0 where the step only says which requests have ended.
        ended: requests that have finished or were aborted since the step before.
        scheduled: tokens by request, where that is known.
    """

    def __init__(self, tokens: int, ended: Collection[str] = (), scheduled: Mapping[str, int] | None = None):
        self.tokens, self.ended, self.scheduled = tokens, ended, scheduled or {}

    def rows(self) -> Sequence[ScheduledTokens]:
        """The rows, request by request, in the order in which the pass computes them. Asked when it starts.

        Their tokens count from ``wait_for_tokens`` on.
        """
        return ()

    def wait_for_tokens(self) -> None:
        """Returns when the tokens of ``rows`` have arrived: until then they are only where the pass reads them."""

    def prompt(self, request: str) -> NDArray[np.int32]:
        """The tokens of the prompt of a request in ``rows``."""
        raise KeyError(request)

    def new_prompts(self) -> Mapping[str, Sequence[int]]:
        """The prompts of requests that begin with this step, as far as they are known before it starts."""
        return {}


def _at_once(job: Callable[[], None]) -> None:
    job()


class RoutingTracer:
    """Follows the requests of one worker.

    Args:
        recorder: keeps the maps of running requests.
        ended: called with the trace of every request that has ended, and what prediction kept of it.
        embed: a vector ``[D]`` of a prompt's tokens ``[n]``; None where the model's embeddings cannot be read.
        later: runs what it is given outside of the steps, in the order given; at once where there is no such place.
        switch: turned off by what raises; then nothing is traced any more.
    """

    def __init__(
        self,
        recorder: Recorder,
        ended: Callable[[Trace, RequestState | None], None],
        embed: Callable[[NDArray[np.integer]], Vector] | None,
        later: Callable[[Callable[[], None]], None] = _at_once,
        switch: Switch | None = None,
    ):
        self.switch = switch or Switch()
        self._recorder = recorder
        self._ended = ended
        self._later = later
        self._embed = embed
        self._embeddings: dict[str, Vector] = {}
        self._traces_step = False

    @property
    def embeddings(self) -> Mapping[str, Vector]:
        """Of the prompts of running requests, where they are known."""
        return self._embeddings

    @property
    def running(self) -> list[str]:
        """Requests that have begun and not ended."""
        return self._recorder.running

    def embed(self, request: str, prompt: NDArray[np.integer]) -> Vector | None:
        """The embedding of a prompt, from now on that of ``request``; None where none can be made."""
        if self._embed is not None:
            self._embeddings[request] = unit(self._embed(prompt))
        return self._embeddings.get(request)

    @optional
    def begin_step(self, batch: Batch) -> Sequence[ScheduledTokens] | None:
        """The forward pass over ``batch`` starts. Returns its rows, None where nothing is traced any more."""
        rows = self._rows_of(batch)
        self._recorder.begin_step(rows)
        self._traces_step = bool(rows)
        return rows

    @optional
    def observe(self, layer: int, experts: NDArray[np.integer], weights: NDArray[np.floating]) -> None:
        """The router of ``layer`` has chosen for the rows of the step: ``[rows, K]``."""
        if self._traces_step:
            self._recorder.note(layer, experts, weights)

    @optional
    def end_step(self) -> Sequence[RequestMaps] | None:
        """The forward pass is over. Returns what its rows were routed to, None where that was not traced."""
        if not self._traces_step:
            return None
        self._traces_step = False
        return self._recorder.end_step()

    @optional
    def rows_of(self, batch: Batch) -> Sequence[ScheduledTokens] | None:
        """The rows of a step for ``trace_step``; None where nothing is traced any more."""
        return self._rows_of(batch)

    @optional
    def trace_step(
        self, rows: Sequence[ScheduledTokens], experts: NDArray[np.integer], weights: NDArray[np.floating]
    ) -> Sequence[RequestMaps] | None:
        """A whole step at once, between others: its ``rows`` were routed to ``experts``, ``[layers, rows, K]``."""
        self._recorder.begin_step(rows)
        self._recorder.note_all(experts, weights)
        return self._recorder.end_step()

    @optional
    def end_request(self, request: str, state: RequestState | None) -> None:
        """A request has finished or was aborted. ``state``: what prediction kept of it."""
        trace = self._recorder.finish(request)
        embedding = self._embeddings.pop(request, None)
        if trace is not None:
            self._later(partial(self._ended, _with_embedding(trace, embedding), state))

    def _rows_of(self, batch: Batch) -> Sequence[ScheduledTokens]:
        """Its rows. From now on the prompts of their requests are embedded."""
        rows = batch.rows()
        for part in rows:
            if self._embed is not None and part.request not in self._embeddings:
                self.embed(part.request, batch.prompt(part.request))
        return rows


def _with_embedding(trace: Trace, embedding: Vector | None) -> Trace:
    return trace if embedding is None else replace(trace, embeddings=embedding[None].astype(np.float16))
