"""Watches every step of one worker and tells those who want to know what its rows were routed to.

It must never change what a step computes, and does nothing at all in steps that serve no request (warm-up, profiling).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..predict.base import RequestState
from ..prefetch.anticipation import Anticipation
from ..prefetch.optional import Switch, optional
from ..threads import keep_blas_on_one_thread
from ..trace.prompt_embedding import unit
from ..trace.recorder import Recorder, ScheduledTokens, routing_shares
from ..trace.trace import Trace

Vector = NDArray[np.float32]


def _at_once(job: Callable[[], None]) -> None:
    job()


class StepSource(Protocol):
    """What the engine says of the running step, once it has put its batch together."""

    def rows(self) -> Sequence[ScheduledTokens]:
        """The rows of the step, request by request, in the order of the batch."""

    def prompt(self, request: str) -> NDArray[np.int32]:
        """The tokens of a request's prompt."""


class Witness:
    """Follows the steps.

    Args:
        recorder: keeps the maps of running requests.
        ended: told of every request that has ended: its trace, and what prediction kept of it.
        embed: a vector ``[D]`` of a prompt's tokens ``[n]``; None where the model's embeddings cannot be read.
        anticipation: looks ahead while the steps run.
        later: runs what it is given outside of the steps, in the order given; at once where there is no such place.
        switch: turned off by what raises; then nothing is watched any more, and nothing looked ahead for.
    """

    def __init__(
        self,
        recorder: Recorder,
        ended: Callable[[Trace, RequestState | None], None],
        embed: Callable[[NDArray[np.integer]], Vector] | None,
        anticipation: Anticipation | None = None,
        later: Callable[[Callable[[], None]], None] = _at_once,
        switch: Switch | None = None,
    ):
        self.switch = switch or Switch()
        self.recorder = recorder
        self._ended = ended
        self._later = later
        self._embed = embed
        self._anticipation = anticipation
        self._num_rows = 0
        self._source: StepSource | None = None
        self._embeddings: dict[str, Vector] = {}
        self._watching = False
        if anticipation is not None:
            keep_blas_on_one_thread()

    @optional
    def begin_step(self, source: StepSource) -> None:
        """A step has been scheduled; its batch is not put together yet."""
        self._source = source
        self._watching = False

    @optional
    def begin_pass(self) -> None:
        """The forward pass of the step starts. Without effect where no step has been announced, or the second time."""
        if self._source is None:
            return
        rows, source, self._source = self._source.rows(), self._source, None
        for part in rows:
            if self._embed is not None and part.request not in self._embeddings:
                self._embeddings[part.request] = unit(self._embed(source.prompt(part.request)))
        self.recorder.begin_step(rows)
        self._num_rows = sum(len(part.tokens) for part in rows)
        self._watching = True
        if self._anticipation is not None:
            self._anticipation.begin_step(rows, self._embeddings)

    @optional
    def routed(self, layer: int, experts: NDArray[np.integer], weights: NDArray[np.floating]) -> None:
        """The router of ``layer`` has chosen: ``[rows, K]``, in the numbers of the whole layer."""
        if self._source is not None:
            self.begin_pass()
        if not self._watching:
            return
        self.recorder.note(layer, experts, weights)
        if self._anticipation is not None and self._anticipation.looks_ahead:
            shares = routing_shares(weights[: self._num_rows])
            self._anticipation.observe(layer, experts[: self._num_rows], shares)

    @optional
    def end_step(self) -> None:
        """The forward pass is over."""
        self._source = None
        if self._watching:
            self._watching = False
            maps = self.recorder.end_step()
            if self._anticipation is not None:
                self._anticipation.end_step(maps)

    @optional
    def requests_ended(self, requests: Iterable[str]) -> None:
        """Requests have finished or were aborted."""
        for request in requests:
            trace = self.recorder.finish(request)
            embedding = self._embeddings.pop(request, None)
            state = None if self._anticipation is None else self._anticipation.close(request)
            if trace is not None:
                self._later(partial(self._ended, _with_embedding(trace, embedding), state))


def _with_embedding(trace: Trace, embedding: Vector | None) -> Trace:
    return trace if embedding is None else replace(trace, embeddings=embedding[None].astype(np.float16))
