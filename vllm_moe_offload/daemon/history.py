"""What all engines of one model remember together. One peer's message must never cost what the others have left, and no
user may learn from it what another's requests said.

Traces of requests come in, checked; those that resemble a new request go out. The file is the one an engine without a
daemon keeps, so that either finds what the other has left.
"""

import os
import threading
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..errors import TraceError
from ..ipc.protocol import HISTORY_MESSAGE_BYTES, HistorySize
from ..ipc.trace_codec import Shape
from ..trace.archive import HistoryArchive
from ..trace.history import PastRequest
from ..trace.persistence import LocalHistory
from ..trace.trace import UNKNOWN_TOKEN, Trace, concat

MOST_BYTES = HISTORY_MESSAGE_BYTES // 2
"""Of traces in one answer."""
LATEST_SHARE = 0.1
"""Of the tokens found by prompt embedding, so many make room for those of the latest requests."""


class DaemonHistory:
    """The history of one model. Any thread may use it.

    Args:
        archive: where it is kept; None for nowhere.
        fingerprint: of the model.
        shape: of its traces.

    Raises:
        TraceError: what is kept under this fingerprint is of another shape.
    """

    def __init__(self, archive: HistoryArchive | None, fingerprint: str, shape: Shape):
        outline = None if archive is None else archive.outline(fingerprint)
        if outline is not None and outline[1] != shape:
            raise TraceError(f"the history of model {fingerprint} holds maps of shape {outline[1]}, not {shape}")
        self.fingerprint, self.shape = fingerprint, shape
        self.folder = None if archive is None else archive.path(fingerprint).parent
        self._kept = LocalHistory(archive, fingerprint, shape)
        self._history = self._kept.history
        self._lock = threading.Lock()
        self._tokens = self._history.num_tokens
        self._saving = threading.Lock()
        self._others: dict[int, int] = {}
        """By number of a request, the user whose it is, where that is not the one this process runs as."""

    @property
    def size(self) -> HistorySize:
        return HistorySize(self._history.num_requests, self._tokens)

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return self._history.nbytes

    def shrink(self, nbytes: int) -> None:
        """Forget requests of at least so many bytes, as if there were no room for them."""
        with self._lock:
            budget = self._history.budget_bytes
            self._history.prune(max(0, self._history.nbytes - nbytes))
            self._history.budget_bytes = budget
            self._tokens = self._history.num_tokens

    def remember(self, trace: Trace, maybe_duplicate: bool = False, user: int | None = None) -> None:
        """A request has ended.

        Args:
            trace: of ``shape``; sound.
            maybe_duplicate: leave it if it is here already.
            user: whose it is; None for the one this process runs as.

        Raises:
            ValueError: it is not one request, or its embedding is of another length than those here.
        """
        if trace.num_requests != 1:
            raise ValueError(f"{trace.num_requests} requests at once; they are remembered one by one")
        with self._lock:
            complete = self._completed(trace)
            if not (maybe_duplicate and self._holds(trace)):
                self._history.add(complete)
                self._tokens = self._history.num_tokens
                self._note_user(user)

    def search(self, embedding: NDArray[np.float32] | None, max_tokens: int, user: int | None = None) -> Trace:
        """What resembles a request, best first, then the latest of the others; the latest alone if its embedding is
        unknown. At most ``max_tokens`` tokens in all.

        Args:
            user: who asks. Of requests of other users he gets the experts, and neither tokens nor embeddings. What was
                read from a file counts as that of the user this process runs as, who can read the file.

        Raises:
            ValueError: the embedding is of another length than those here.
        """
        with self._lock:
            width = self._width()
            if embedding is not None and width is not None and len(embedding) != width:
                raise ValueError(f"the embedding sought has {len(embedding)} numbers, those of this history {width}")
            near = [] if embedding is None else self._history.nearest(embedding, self._history.num_requests)
            latest = self._history.requests[::-1]
        most = max(0, min(max_tokens, MOST_BYTES // _bytes_per_token(latest)))
        chosen = _whole(near, int((1 - LATEST_SHARE) * most))
        numbers = {past.number for past in chosen}
        chosen += [past for past in latest if past.number not in numbers]
        return concat([self._shown_to(user, past).rows(slice(count)) for past, count in _cut(chosen, most)], self.shape)

    def save(self, at_once: bool = False) -> None:
        """Write it if it has grown and the last time is long enough ago, or ``at_once``."""
        with self._saving:
            self._kept.save(at_once)

    def _completed(self, trace: Trace) -> Trace:
        """The trace with whatever all requests here have: without it, none would have it any more.

        An embedding of zeros is near to nothing.
        """
        if not self._history.requests:
            return trace
        last, width = self._history.requests[-1].trace, self._width()
        if width is not None and trace.embeddings is not None and trace.embeddings.shape[1] != width:
            raise ValueError(f"an embedding of {trace.embeddings.shape[1]} numbers among such of {width}")
        return trace.filled(last)

    def _note_user(self, user: int | None) -> None:
        """Whose the request is that was added last. Under the lock."""
        if user not in (None, os.geteuid()) and self._history.requests:
            self._others[self._history.requests[-1].number] = user
        if len(self._others) > self._history.num_requests:
            numbers = {past.number for past in self._history.requests}
            self._others = {number: user for number, user in self._others.items() if number in numbers}

    def _shown_to(self, user: int | None, past: PastRequest) -> Trace:
        us = os.geteuid()
        if self._others.get(past.number, us) == (us if user is None else user):
            return past.trace
        return _without_content(past.trace)

    def _width(self) -> int | None:
        """Of the embeddings here, if there are any."""
        embeddings = self._history.requests[-1].trace.embeddings if self._history.requests else None
        return None if embeddings is None else embeddings.shape[1]

    def _holds(self, trace: Trace) -> bool:
        return any(
            past.trace.num_tokens == trace.num_tokens
            and np.array_equal(past.trace.experts, trace.experts)
            and np.array_equal(past.trace.weights, trace.weights)
            for past in self._history.requests
        )


def _bytes_per_token(requests: list[PastRequest]) -> int:
    """The most that a token takes, and its request with it."""
    return max((past.trace.nbytes // past.trace.num_tokens + 1 for past in requests), default=1)


def _whole(requests: list[PastRequest], most: int) -> list[PastRequest]:
    """The first of ``requests`` that have at most ``most`` tokens together; the very first in any case."""
    ends = np.cumsum([past.trace.num_tokens for past in requests])
    return requests[: max(1, int(np.searchsorted(ends, most, side="right")))]


def _cut(requests: Iterable[PastRequest], most: int) -> list[tuple[PastRequest, int]]:
    """The first of ``requests`` with at most ``most`` tokens together, and how many of each."""
    chosen = []
    for past in requests:
        count = min(past.trace.num_tokens, most)
        if count == 0:
            break
        chosen.append((past, count))
        most -= count
    return chosen


def _without_content(trace: Trace) -> Trace:
    """Which experts a request was routed to, and nothing of what it said."""
    return replace(
        trace,
        tokens=None if trace.tokens is None else np.full_like(trace.tokens, UNKNOWN_TOKEN),
        embeddings=None if trace.embeddings is None else np.zeros_like(trace.embeddings),
    )
