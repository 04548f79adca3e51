"""Keeps the history of one model between starts of the engine."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from ..history.archive import HistoryArchive
from ..history.store import HistoryStore

SECONDS_BETWEEN_SAVES = 60.0
BYTES_PER_SECOND = 1 << 20
"""A history is always written whole: a large one is written less often, so that disks last."""


def seconds_between_saves(nbytes: int) -> float:
    """How long a history of so many bytes waits before it is written again."""
    return max(SECONDS_BETWEEN_SAVES, nbytes / BYTES_PER_SECOND)


class Keeper(ABC):
    """The history of a running engine, and whatever keeps it."""

    fingerprint: str
    """Of the model."""
    history: HistoryStore
    folder: Path | None
    """Where what is learned from the history belongs, for other engines of the model too; None for nowhere."""

    @abstractmethod
    def save(self) -> None:
        """Have it kept if it has grown. Called every few seconds from a thread that may wait."""

    @abstractmethod
    def snapshot(self, directory: Path) -> Path | None:
        """A file of everything that is remembered of the model, in ``directory`` unless there is one elsewhere.

        None if it cannot be had at present.
        """

    @abstractmethod
    def close(self) -> None:
        """The engine ends: what is not kept yet is kept now."""


class HistoryKeeper(Keeper):
    """Keeps a history in a file of this process.

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
        self.folder = None if archive is None else archive.path(fingerprint).parent
        self._archive = archive if writes else None
        self._saved_at = time.monotonic()
        if archive is not None:
            self.history, problem = archive.load(fingerprint, shape)
            if problem is not None:
                warn(f"the history starts empty: {problem}")
        self._saved_number = self._last_number

    def save(self, at_once: bool = False) -> None:
        """Write the history if it has grown and the last time is long enough ago, or ``at_once``."""
        last = self._last_number
        due = at_once or time.monotonic() - self._saved_at >= seconds_between_saves(self.history.nbytes)
        if self._archive is not None and due and last != self._saved_number:
            self._saved_at = time.monotonic()  # also when it fails: a full disk is not asked again at once
            self._archive.save(self.fingerprint, self.history)
            self._saved_number = last

    def snapshot(self, directory: Path) -> Path | None:
        return HistoryArchive(directory).save(self.fingerprint, self.history)

    def close(self) -> None:
        self.save(at_once=True)

    @property
    def _last_number(self) -> int:
        return self.history.requests[-1].number if self.history.requests else -1
