"""Steps of which the host learns only after they have ended what they were routed to, as where a device manages slots.

What a step's rows are is known when its pass has been enqueued; they wait here for what has become of them. Requests
that end meanwhile leave when all of their steps have been traced.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..predict.base import RequestState
from ..report.activity import Activity
from ..trace.recorder import RequestMaps, ScheduledTokens
from .tracer import Batch, RoutingTracer


class ServedStep(Protocol):
    """What is known in the end of a step; layers are in the order in which they run."""

    @property
    def number(self) -> int: ...

    @property
    def ids(self) -> NDArray[np.integer]:
        """``[layers, rows, top_k]``: the experts chosen, without padding; negative where there is none."""

    @property
    def weights(self) -> NDArray[np.floating]:
        """Likewise: the router's weights."""

    @property
    def used(self) -> NDArray[np.integer]:
        """``[layers]``: distinct experts."""

    @property
    def misses(self) -> NDArray[np.integer]:
        """``[layers]``: of these, those that had to be loaded."""


class MapsConsumer(Protocol):
    """Told in the order of steps what requests were routed to, as far as it could be traced."""

    def end_step(self, maps: Sequence[RequestMaps]) -> None:
        """``maps`` are what the rows of a step have been through."""

    def end_request(self, request: str) -> RequestState | None:
        """A request has ended. Returns what was known of it."""


class _Step(NamedTuple):
    number: int
    batch: Batch
    rows: Sequence[ScheduledTokens]


class RoutingQueue:
    """The steps of one worker that have been enqueued, until it is known what they have done.

    Args:
        activity: told of every step and of the ends of requests.
    """

    def __init__(self, activity: Activity):
        self._activity = activity
        self.tracer: RoutingTracer | None = None
        self.consumer: MapsConsumer | None = None
        """Of what is traced."""
        self._waiting: deque[_Step | Collection[str]] = deque()
        """Steps, and the requests that have ended after those before them."""

    def end_requests(self, requests: Collection[str]) -> None:
        """Requests have finished, failed or were aborted: no step follows that has rows of them."""
        if requests:
            self._waiting.append(requests)
            self._let_requests_leave()

    @property
    def embeddings(self) -> Mapping[str, NDArray[np.float32]]:
        """Of the prompts of running requests, where they are known."""
        return {} if self.tracer is None else self.tracer.embeddings

    def add(self, number: int, batch: Batch) -> Sequence[ScheduledTokens]:
        """The pass over ``batch`` is step ``number``, which is larger than those before. Returns its rows, if known."""
        rows = None if self.tracer is None else self.tracer.rows_of(batch)
        self._waiting.append(_Step(number, batch, rows or ()))
        return rows or ()

    def end_step(self, step: ServedStep, own: NDArray[np.integer]) -> None:
        """All is known of ``step``. Steps before it of which nothing was said were left early: none of them is traced.

        Of one that was not added, nothing is done.

        Args:
            own: ``step.ids`` in the numbers of this worker's experts, negative where another has it.
        """
        while self._waiting:
            first = self._waiting[0]
            if isinstance(first, _Step):
                if first.number > step.number:
                    break
                self._waiting.popleft()
                if first.number == step.number:
                    self._end_step(first, step, own)
            else:
                self._let_requests_leave()
        self._let_requests_leave()

    def close(self) -> None:
        """No step is to come: all requests end."""
        for waiting in self._waiting:
            if not isinstance(waiting, _Step):
                self._end(waiting)
        self._waiting.clear()
        if self.tracer is not None:
            self._end(self.tracer.running)

    def _end_step(self, known: _Step, step: ServedStep, own: NDArray[np.integer]) -> None:
        self._activity.note_routed(known.batch.scheduled, own, step.used, step.misses)
        if self.tracer is None or not known.rows:
            return
        known.batch.wait_for_tokens()
        maps = self.tracer.trace_step(known.rows, step.ids, step.weights)
        if maps is not None and self.consumer is not None:
            self.consumer.end_step(maps)

    def _let_requests_leave(self) -> None:
        while self._waiting and not isinstance(self._waiting[0], _Step):
            self._end(self._waiting.popleft())  # type: ignore[arg-type]

    def _end(self, requests: Collection[str]) -> None:
        self._activity.end_requests(requests)
        for request in requests:
            state = None if self.consumer is None else self.consumer.end_request(request)
            if self.tracer is not None:
                self.tracer.end_request(request, state)
