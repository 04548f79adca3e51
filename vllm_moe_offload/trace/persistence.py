"""The history of one model, kept between starts of the engine."""

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from pathlib import Path

from ..errors import TraceError
from ..store.files import FileVersion
from .archive import HistoryArchive
from .history import HistoryStore
from .trace import Trace

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_SAVES = 60.0
BYTES_PER_SECOND = 1 << 20
"""A history is always written whole: a large one is written less often, so that disks last."""


def seconds_between_saves(nbytes: int) -> float:
    """How long a history of so many bytes waits before it is written again."""
    return max(SECONDS_BETWEEN_SAVES, nbytes / BYTES_PER_SECOND)


class PersistentHistory(ABC):
    """The history of a running engine, and where it is kept."""

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


class LocalHistory(PersistentHistory):
    """Keeps a history in a file, to which other processes may add requests of the same model.

    What others have added is kept: then each writes what is in the file and its own requests that are not yet. They
    learn of each other's requests at the next start.

    Args:
        archive: where histories lie; None keeps this one in memory only.
        fingerprint: of the model.
        shape: layers, experts per layer, experts per token.
        writes: whether this worker is the one that keeps the file.
    """

    def __init__(
        self,
        archive: HistoryArchive | None,
        fingerprint: str,
        shape: tuple[int, int, int],
        writes: bool = True,
    ):
        self.fingerprint = fingerprint
        self.history = HistoryStore(shape)
        self.folder = None if archive is None else archive.path(fingerprint).parent
        self._archive = archive if writes else None
        self._saved_at = time.monotonic()
        self._file: FileVersion | None = None
        """The file that holds just what this process had when it was last read or written; None for no file."""
        self._others_write = False
        if archive is not None:
            with contextlib.suppress(OSError):  # a wrong version only means that the file is read again
                self._file = archive.version(fingerprint)
            self.history, problem = archive.load(fingerprint, shape)
            if problem is not None:
                self._file = None
                logger.warning("the history starts empty: %s", problem)
        self._saved_number = self._last_number

    def save(self, at_once: bool = False) -> None:
        """Write the history if it has grown and the last time is long enough ago, or ``at_once``.

        Raises:
            OSError: it cannot be written.
            TraceError: what others have written cannot be read at present, or be kept together with this.
        """
        last = self._last_number
        due = at_once or time.monotonic() - self._saved_at >= seconds_between_saves(self.history.nbytes)
        if self._archive is not None and due and last != self._saved_number:
            self._saved_at = time.monotonic()  # also when it fails: a full disk is not asked again at once
            with self._archive.locked(self.fingerprint):
                self._file = self._archive.write(self.fingerprint, self._to_be_kept(self._archive, last))
            self._saved_number = last

    def snapshot(self, directory: Path) -> Path | None:
        return HistoryArchive(directory).save(self.fingerprint, self.history)

    def close(self) -> None:
        self.save(at_once=True)

    def _to_be_kept(self, archive: HistoryArchive, last: int) -> Trace:
        """What the file is to hold: this history up to request ``last``, and what others have written.

        Where others write, this process adds what it has seen since it last did: what they removed stays removed.
        """
        if not self._others_write and archive.version(self.fingerprint) == self._file:
            return self.history.to_trace(last)
        in_file, damaged = archive.load_locked(self.fingerprint, self.history.shape)
        if damaged is not None:
            return self.history.to_trace(last)
        self._others_write = True
        new = [past.trace for past in list(self.history.requests) if self._saved_number < past.number <= last]
        try:
            in_file.extend(new)
        except ValueError as error:
            raise TraceError(f"{archive.path(self.fingerprint)}: {error}") from error
        return in_file.to_trace()

    @property
    def _last_number(self) -> int:
        return self.history.requests[-1].number if self.history.requests else -1
