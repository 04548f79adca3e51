"""The histories of all models a daemon serves. What a peer names must never lead outside of the daemon's own folder."""

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from ..errors import ConfigError, OffloadError, TraceError
from ..ipc.protocol import HistorySize, ModelStatus, OpenHistory
from ..ipc.trace_codec import Shape
from ..ipc.transport import LARGE_MESSAGES
from ..learning.background import Background
from ..trace.archive import HistoryArchive
from .history import DaemonHistory

logger = logging.getLogger(__name__)

MOST_HISTORIES = 16
"""In memory at a time; those that no engine uses make room for others."""
MOST_BYTES = 1 << 30
"""Of all of them together."""
MOST_STORES = 256
SECONDS_BETWEEN_ROUNDS = 5.0

_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_MOST_LAYERS = 1024
_MOST_EXPERTS = 1 << 16


class DaemonHistories:
    """Opens histories for connections and writes what has grown. Any thread may use it.

    Args:
        folder: where they are kept; None keeps them for as long as the daemon lives.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None):
        self._archive = None if folder is None else HistoryArchive(folder)
        if self._archive is not None and (problem := self._archive.problem()) is not None:
            raise ConfigError(f"--history {folder}: {problem}; name a folder that can be written, or 'off'")
        self.large = threading.BoundedSemaphore(LARGE_MESSAGES)
        """For connections about histories, see ``Channel``."""
        self._lock = threading.Lock()
        self._histories: dict[str, DaemonHistory] = {}
        self._users: dict[str, int] = {}
        """Connections of each history."""
        self._shown_by: dict[str, str] = {}
        """Fingerprint of the history that the status of a store shows."""
        self._complaint = ""
        self._background = Background(self._round, SECONDS_BETWEEN_ROUNDS, self._complain)

    def open(self, request: OpenHistory) -> DaemonHistory:
        """The history a peer asks for, until it is left.

        Raises:
            ValueError: fingerprint or shape are none.
            TraceError: it does not fit what is kept.
            OffloadError: there are too many in use.
        """
        if not _FINGERPRINT.fullmatch(request.fingerprint):
            raise ValueError("a fingerprint has 32 hexadecimal digits")
        _check_shape(request.shape)
        with self._lock:
            history = self._histories.get(request.fingerprint)
            if history is None:
                self._make_room()
                history = self._load(request)
                self._histories[request.fingerprint] = history
                self._users[request.fingerprint] = 0
            elif history.shape != request.shape:
                raise OffloadError(f"the history of this model holds maps of shape {history.shape}")
            self._users[request.fingerprint] += 1
            self._bound()
            self._show(request.fingerprint, request.store)
            return history

    def leave(self, history: DaemonHistory) -> None:
        """A connection that had opened it has ended."""
        with self._lock:
            self._users[history.fingerprint] -= 1

    def keep_within_bounds(self) -> None:
        """A history has grown: where all together are too large, those that nobody uses go (they are saved), and if
        that is not enough the largest one forgets requests."""
        with self._lock:
            self._bound()

    def with_sizes(self, models: list[ModelStatus]) -> list[ModelStatus]:
        """The same status, with the size of each model's history."""
        return [self._with_size(model) for model in models]

    def save(self) -> None:
        """Write what has not been written yet."""
        with self._lock:
            histories = list(self._histories.values())
        for history in histories:
            self._save(history, at_once=True)

    def close(self) -> None:
        """Write what is to be kept. Idempotent."""
        self._background.close()
        self.save()

    def _load(self, request: OpenHistory) -> DaemonHistory:
        try:
            return DaemonHistory(self._archive, request.fingerprint, request.shape)
        except OSError as error:
            raise TraceError(f"the history of model {request.fingerprint} cannot be read: {error}") from None

    def _show(self, fingerprint: str, store: str) -> None:
        self._shown_by.pop(store, None)
        self._shown_by[store] = fingerprint
        if len(self._shown_by) > MOST_STORES:
            del self._shown_by[next(iter(self._shown_by))]

    def _with_size(self, model: ModelStatus) -> ModelStatus:
        with self._lock:
            history = self._histories.get(self._shown_by.get(model.store, ""))
        size = HistorySize(0, 0) if history is None else history.size
        sizes = {"history_requests": size.requests, "history_tokens": size.tokens}
        return msgspec.structs.replace(model, stats=model.stats | sizes)

    def _make_room(self) -> None:
        self._drop_idle(lambda: len(self._histories) >= MOST_HISTORIES)
        if len(self._histories) >= MOST_HISTORIES:
            raise OffloadError(f"histories of {MOST_HISTORIES} models are in use, which is as many as are kept")

    def _bound(self) -> None:
        if self._excess() > 0:
            self._drop_idle(lambda: self._excess() > 0)
        if (excess := self._excess()) > 0:
            max(self._histories.values(), key=lambda history: history.nbytes).shrink(excess)

    def _excess(self) -> int:
        return sum(history.nbytes for history in self._histories.values()) - MOST_BYTES

    def _drop_idle(self, crowded: Callable[[], bool]) -> None:
        """Save and let go of histories nobody uses, the first opened first, for as long as it is ``crowded``. One that
        cannot be saved stays."""
        for fingerprint in [fingerprint for fingerprint, users in self._users.items() if not users]:
            if not crowded():
                return
            if not self._save(self._histories[fingerprint], at_once=True):
                continue
            del self._histories[fingerprint], self._users[fingerprint]
            self._shown_by = {store: shown for store, shown in self._shown_by.items() if shown != fingerprint}

    def _round(self) -> None:
        with self._lock:
            histories = list(self._histories.values())
        saved = [self._save(history) for history in histories]
        if all(saved):
            self._complaint = ""

    def _save(self, history: DaemonHistory, at_once: bool = False) -> bool:
        try:
            history.save(at_once)
        except (OSError, OffloadError) as error:
            self._complain(error)
            return False
        return True

    def _complain(self, error: Exception) -> None:
        complaint = f"a history cannot be saved: {error}"
        if complaint != self._complaint:
            self._complaint = complaint
            logger.warning(complaint)


def _check_shape(shape: Shape) -> None:
    layers, experts, top_k = shape
    if not (0 < layers <= _MOST_LAYERS and 0 < top_k <= experts <= _MOST_EXPERTS):
        raise ValueError(f"no model has the shape {shape}")
