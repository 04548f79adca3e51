"""The history: a bounded set of past requests, each with its expert maps and its prompt embedding.

It evicts the request that is most like a newer one, or oldest, so that one chat cannot fill it and a rare domain is
not forgotten. It has nothing to do with files (``archive``) and of how maps are matched (``predict``).
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .trace import Trace, concat, sound_tokens

DEFAULT_BUDGET_BYTES = 256 << 20
_AGE_WEIGHT = 0.25
"""How much similarity to a newer request the oldest request's age is worth."""
_MAX_SHARE = 1 / 16
"""No single request may hold more of the budget."""


@dataclass(frozen=True)
class PastRequest:
    """One request as the history keeps it."""

    trace: Trace
    """A trace of exactly this request."""
    number: int
    """Requests are numbered in the order they arrived."""

    @property
    def embedding(self) -> NDArray[np.float32] | None:
        """Unit vector ``[D]``, or None when the recorder had none."""
        if self.trace.embeddings is None:
            return None
        return self.trace.embeddings[0].astype(np.float32)


class HistoryStore:
    """Past requests within a byte budget.

    Invariant (``check_integrity``): ``nbytes <= budget_bytes``, numbers rise, all traces have the same shape, all
    embeddings the same width.
    """

    def __init__(self, shape: tuple[int, int, int], budget_bytes: int = DEFAULT_BUDGET_BYTES):
        """``shape``: layers, experts per layer, experts per token, as in ``Trace.shape``."""
        self.shape = shape
        self.budget_bytes = budget_bytes
        self.requests: list[PastRequest] = []
        self.tokens_added = 0
        """Ever, whatever has been forgotten since."""
        self._redundancy: list[float] = []
        self._next_number = 0
        self._nbytes = self._tokens = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    @property
    def num_tokens(self) -> int:
        return self._tokens

    @property
    def width(self) -> int | None:
        """Numbers in an embedding; None while no request has one."""
        widths = (past.trace.embeddings.shape[1] for past in self.requests if past.trace.embeddings is not None)
        return next(widths, None)

    def add(self, trace: Trace) -> None:
        """Remember a finished request (a trace of one request), forgetting others to make room.

        A request with more tokens than its share of the budget keeps its last ones. One without tokens is ignored.

        Raises:
            ValueError: the trace is of another shape, of more than one request, or unsound, or its embedding not finite
                or of another width than those here.
        """
        if trace.shape != self.shape or trace.num_requests != 1:
            raise ValueError(f"expected one request of shape {self.shape}, got {trace.num_requests} of {trace.shape}")
        width = None if trace.embeddings is None else trace.embeddings.shape[1]
        if width is not None and self.width not in (None, width):
            raise ValueError(
                f"embeddings: the request's has {width} numbers, those of the history {self.width}; one function must "
                "have made them all"
            )
        if not sound_tokens(trace.experts, trace.weights, trace.num_experts).all():
            raise ValueError("a token's experts or weights are none that a trace can hold")
        if trace.embeddings is not None and not np.isfinite(trace.embeddings).all():
            raise ValueError("embeddings: holds values that are not finite")
        if trace.num_tokens == 0:
            return
        past = PastRequest(_own(_last_tokens(trace, self._tokens_per_request(trace))), self._next_number)
        self._next_number += 1
        self._note_likeness_to(past)
        self.requests.append(past)
        self._redundancy.append(0.0)
        self._nbytes += past.trace.nbytes
        self._tokens += past.trace.num_tokens
        self.tokens_added += past.trace.num_tokens
        while self._nbytes > self.budget_bytes:
            self._forget(self._least_valuable())

    def extend(self, traces: Iterable[Trace]) -> None:
        """Add several requests, oldest first."""
        for trace in traces:
            self.add(trace)

    def nearest(self, embedding: NDArray[np.floating] | None, count: int) -> list[PastRequest]:
        """The ``count`` requests with the most similar prompt embeddings, best first, those without an embedding last.

        The most recent ones where embeddings cannot be compared: ``embedding`` is None or of another width.
        """
        if embedding is None or self.width != len(embedding):
            return self.requests[::-1][:count]
        requests = list(self.requests)  # another thread may be adding
        similarity = _similarity(requests, np.asarray(embedding, np.float32))
        return [requests[i] for i in np.argsort(-similarity, kind="stable")[:count]]

    def seek(
        self, embedding: NDArray[np.floating] | None, count: int, found: Callable[[list[PastRequest]], None]
    ) -> None:
        """Give ``found`` what ``nearest`` finds at once, and from another thread what can only be found later."""
        found(self.nearest(embedding, count))

    def to_trace(self, newest: int | None = None) -> Trace:
        """Everything as one trace, oldest request first; without requests that came after number ``newest``.

        What only some requests have is kept, and filled up for the others: unknown tokens are -1, an unknown phase is
        DECODE, an unknown embedding the zero vector, which is similar to nothing.
        """
        traces = [past.trace for past in list(self.requests) if newest is None or past.number <= newest]
        if not traces:
            return concat([], self.shape)
        complete = functools.reduce(Trace.filled, traces, traces[-1])
        return concat([trace.filled(complete) for trace in traces], self.shape)

    def prune(self, budget_bytes: int) -> None:
        """Forget requests until no more than ``budget_bytes`` are held, and keep to that from now on."""
        self.budget_bytes = budget_bytes
        while self._nbytes > budget_bytes:
            self._forget(self._least_valuable())

    def check_integrity(self) -> None:
        """Assert the invariants."""
        numbers = [past.number for past in self.requests]
        assert numbers == sorted(set(numbers)) and len(numbers) == len(self._redundancy)
        assert self._nbytes == sum(past.trace.nbytes for past in self.requests) <= self.budget_bytes
        assert self._tokens == sum(past.trace.num_tokens for past in self.requests)
        assert all(past.trace.shape == self.shape for past in self.requests)
        widths = {past.trace.embeddings.shape[1] for past in self.requests if past.trace.embeddings is not None}
        assert len(widths) <= 1

    def _least_valuable(self) -> int:
        """Index of the request whose embedding a newer one repeats most, age counting too; never the newest."""
        ages = np.linspace(_AGE_WEIGHT, 0, len(self.requests))
        return int(np.argmax((np.array(self._redundancy) + ages)[:-1])) if len(self.requests) > 1 else 0

    def _note_likeness_to(self, newer: PastRequest) -> None:
        if newer.embedding is not None and self.requests:
            self._redundancy = np.maximum(self._redundancy, _similarity(self.requests, newer.embedding)).tolist()

    def _forget(self, index: int) -> None:
        forgotten = self.requests.pop(index).trace
        self._nbytes -= forgotten.nbytes
        self._tokens -= forgotten.num_tokens
        self._redundancy.pop(index)

    def _tokens_per_request(self, trace: Trace) -> int:
        per_token = max(1, (trace.experts.nbytes + trace.weights.nbytes) // trace.num_tokens + 5)
        return max(1, int(self.budget_bytes * _MAX_SHARE) // per_token)


def _similarity(requests: Sequence[PastRequest], embedding: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine of each request's embedding and this one, both of the same width; -1 where it has none."""
    known = [i for i, past in enumerate(requests) if past.trace.embeddings is not None]
    similarity = np.full(len(requests), -1, np.float32)
    if known:
        rows = [requests[i].trace.embeddings[0] for i in known]  # type: ignore[index]
        similarity[known] = np.stack(rows).astype(np.float32) @ embedding
    return similarity


def _last_tokens(trace: Trace, count: int) -> Trace:
    return trace.rows(slice(max(0, trace.num_tokens - count), None))


def _own(trace: Trace) -> Trace:
    """A copy that keeps no larger array alive."""
    return trace.select([0])
