"""The history as an engine sees it that shares one with others: theirs through the daemon, its own latest at hand.

What predictors ask of it is answered at once from what is at hand; what the daemon finds follows. Without a daemon
it is what every engine has, only smaller.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..ipc.protocol import OpenHistory
from ..trace.archive import HISTORY_FILE, HistoryArchive
from ..trace.history import HistoryStore, PastRequest
from ..trace.persistence import PersistentHistory
from ..trace.trace import Trace
from ..trace.trace_file import write_trace
from .history_client import HistoryClient

BUDGET_BYTES = 32 << 20
"""Of requests at hand."""
FIRST_TOKENS = 20_000
"""Of the latest requests of all engines, so many are at hand from the start."""
_FRESH = 0.9
"""A file with this share of the daemon's tokens is worth learning from."""


class RemoteHistory(HistoryStore):
    """The requests at hand. Its counts are those of the daemon's history where that is larger.

    Args:
        client: of the daemon's history.
        shape: of the traces.
        most_found: tokens that a search may bring.
        tells: whether this worker tells the daemon of requests that have ended.
    """

    def __init__(self, client: HistoryClient, shape: tuple[int, int, int], most_found: int, tells: bool):
        super().__init__(shape, BUDGET_BYTES)
        self._client, self._most_found, self._tells = client, most_found, tells
        self._at_hand = threading.Lock()
        latest = client.find(None, FIRST_TOKENS)
        if latest is not None:
            for trace in reversed(list(latest.requests())):
                super().add(trace)

    @property
    def num_requests(self) -> int:
        return max(self._client.size.requests, super().num_requests)

    @property
    def num_tokens(self) -> int:
        return max(self._client.size.tokens, super().num_tokens)

    def add(self, trace: Trace) -> None:
        with self._at_hand:
            super().add(trace)
        if self._tells and trace.num_tokens:
            self._client.tell(trace)

    def seek(
        self, embedding: NDArray[np.floating] | None, count: int, found: Callable[[list[PastRequest]], None]
    ) -> None:
        """The daemon's answer, and nothing until it is there; what is at hand if there is no daemon to answer."""

        def answered(trace: Trace | None) -> None:
            found(self._nearest_at_hand(embedding, count) if trace is None else _past(trace)[:count])

        found([])
        if not self._client.ask(embedding, self._most_found, answered):
            answered(None)

    def _nearest_at_hand(self, embedding: NDArray[np.floating] | None, count: int) -> list[PastRequest]:
        with self._at_hand:
            return self.nearest(embedding, count)


class SharedHistory(PersistentHistory):
    """Leaves the history of one engine to the daemon.

    Args:
        path: of the daemon's socket.
        request: which history.
        most_found: tokens that a search may bring.
        tells: whether this worker tells the daemon of requests that have ended: one rank of those that see the same.
    """

    def __init__(self, path: Path, request: OpenHistory, most_found: int, tells: bool):
        self.fingerprint = request.fingerprint
        self._client = HistoryClient(path, request)
        self.history: HistoryStore = RemoteHistory(self._client, request.shape, most_found, tells)
        folder = self._client.folder
        self.folder = folder if folder is not None and _can_write(folder) else None

    def save(self) -> None:
        """The daemon does that."""

    def snapshot(self, directory: Path) -> Path | None:
        wanted = _FRESH * self.history.num_tokens
        if self.folder is not None:
            outline = HistoryArchive(self.folder.parent).outline(self.fingerprint)
            if outline is not None and outline[0] >= wanted:
                return self.folder / HISTORY_FILE
        trace = self._client.find(None, self.history.num_tokens)
        if trace is None or (self.folder is not None and trace.num_tokens < wanted):
            return None
        write_trace(directory / HISTORY_FILE, replace(trace, fingerprint=self.fingerprint), compress=False)
        return directory / HISTORY_FILE

    def close(self) -> None:
        self._client.close()


def _past(trace: Trace) -> list[PastRequest]:
    return [PastRequest(request, number) for number, request in enumerate(trace.requests())]


def _can_write(folder: Path) -> bool:
    """Whether this process sees the daemon's folder of this history, which may not exist yet, and may write there."""
    return os.access(folder if os.access(folder, os.F_OK) else folder.parent, os.R_OK | os.W_OK | os.X_OK)
