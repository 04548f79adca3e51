"""Keeps the history of one model between starts of the engine."""

import time
from collections.abc import Callable

from ..history.archive import HistoryArchive
from ..history.store import HistoryStore

SECONDS_BETWEEN_SAVES = 60.0


class HistoryKeeper:
    """The history of a running engine, and the file it is kept in.

    Args:
        archive: where histories lie; None keeps this one in memory only.
        fingerprint: of the model.
        shape: layers, experts per layer, experts per token.
        warn: told in a sentence when a file could not be used and was set aside.
        writes: whether this worker is the one that keeps the file.
    """

    def __init__(
        self,
        archive: HistoryArchive | None,
        fingerprint: str,
        shape: tuple[int, int, int],
        warn: Callable[[str], None],
        writes: bool = True,
    ):
        self.fingerprint = fingerprint
        self.history = HistoryStore(shape)
        self.archive = archive
        self.writes = writes and archive is not None
        self._saved_number = -1
        self._saved_at = time.monotonic()
        if archive is not None:
            self.history, problem = archive.load(fingerprint, shape)
            if problem is not None:
                warn(f"the history starts empty: {problem}")
        self._saved_number = self._last_number

    def save(self, at_once: bool = False) -> None:
        """Write the history if it has grown and the last time is long enough ago, or ``at_once``."""
        last = self._last_number
        due = at_once or time.monotonic() - self._saved_at >= SECONDS_BETWEEN_SAVES
        if self.writes and self.archive is not None and due and last != self._saved_number:
            self.archive.save(self.fingerprint, self.history)
            self._saved_number, self._saved_at = last, time.monotonic()

    @property
    def _last_number(self) -> int:
        return self.history.requests[-1].number if self.history.requests else -1
