"""Histories on disk: one folder per model fingerprint, written whole, loaded only if sound and of that very model.

A file whose content cannot be used is never deleted: it is renamed, and the engine starts empty. One that cannot be
read at present stays where it is. Whoever writes holds the lock of the folder.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import TraceError, TraceReadError
from ..store.files import FileVersion, file_version, locked, make_private_folder, remove_leftovers, set_aside
from .history import DEFAULT_BUDGET_BYTES, HistoryStore
from .npz import NpzReader
from .trace import Trace
from .trace_file import read_trace, write_trace

HISTORY_FILE = "history.npz"
HISTORY_LOCK_FILE = "history.lock"
LOCK_SECONDS = 10.0
"""For others to finish: writing the largest history takes a fraction of this."""


@dataclass(frozen=True)
class HistoryEntry:
    """One model's history on disk."""

    fingerprint: str
    path: Path
    nbytes: int


class HistoryArchive:
    """The histories under one directory."""

    def __init__(self, directory: Path):
        self.directory = directory

    def path(self, fingerprint: str) -> Path:
        """Where the history of a model lies."""
        return self.directory / fingerprint / HISTORY_FILE

    def problem(self) -> str | None:
        """Why nothing can be kept here, or None. Creates the directory."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                return None
        except OSError as error:
            return str(error)

    def entries(self) -> Iterator[HistoryEntry]:
        """All histories found, by fingerprint."""
        for path in sorted(self.directory.glob(f"*/{HISTORY_FILE}")):
            yield HistoryEntry(path.parent.name, path, path.stat().st_size)

    def version(self, fingerprint: str) -> FileVersion | None:
        """Of the file of a model; None while there is none. Raises OSError if that cannot be found out."""
        return file_version(self.path(fingerprint))

    def load(
        self, fingerprint: str, shape: tuple[int, int, int], budget_bytes: int = DEFAULT_BUDGET_BYTES
    ) -> tuple[HistoryStore, str | None]:
        """The history of a model, empty when there is none or it cannot be used. Never raises for what is on disk.

        Returns the store, and what was wrong with the file, else None.
        """
        path = self.path(fingerprint)
        with contextlib.suppress(OSError):  # where they cannot be written, they can still be read
            if path.parent.exists():
                make_private_folder(path.parent)
                remove_leftovers(path)
        try:
            return self._load(fingerprint, shape, budget_bytes), None
        except TraceReadError as error:
            return HistoryStore(shape, budget_bytes), f"{error}; the file stays as it is"
        except TraceError as error:
            return HistoryStore(shape, budget_bytes), f"{error}; {self._set_aside(fingerprint, shape)}"

    def outline(self, fingerprint: str) -> tuple[int, tuple[int, int, int]] | None:
        """Tokens a model's history holds and the shape of their maps, without reading them; None if that fails."""
        try:
            with self.path(fingerprint).open("rb") as file:
                archive = NpzReader(file)
                tokens, layers, top_k = archive.outline("experts").shape
                experts = int(archive.read("num_experts"))
            return tokens, (layers, experts, top_k)
        except (OSError, MemoryError, KeyError, TypeError, ValueError):
            return None

    def read(self, fingerprint: str) -> Trace:
        """The stored trace, for export.

        Raises:
            TraceError: there is none, or it is damaged or of another model; the file stays where it is.
            TraceReadError: it cannot be read at present.
        """
        trace = read_trace(self.path(fingerprint))
        if trace.fingerprint != fingerprint:
            raise TraceError(
                f"{self.path(fingerprint)}: belongs to model {trace.fingerprint or 'unknown'!r}, not to {fingerprint!r}"
            )
        return trace

    @contextmanager
    def locked(self, fingerprint: str) -> Iterator[None]:
        """Hold the lock for writing this history.

        Raises:
            TimeoutError: another process writes it and does not come to an end.
            OSError: the folder cannot be made or written.
        """
        folder = self.path(fingerprint).parent
        make_private_folder(folder)
        with locked(folder / HISTORY_LOCK_FILE, LOCK_SECONDS):
            yield

    def write(self, fingerprint: str, trace: Trace) -> FileVersion:
        """Replace a history so that a crash leaves the old one or the new one. Only while it is ``locked``."""
        write_trace(self.path(fingerprint), replace(trace, fingerprint=fingerprint), compress=False)
        version = self.version(fingerprint)
        assert version is not None
        return version

    def save(self, fingerprint: str, store: HistoryStore) -> Path:
        """``write``, whatever is there."""
        with self.locked(fingerprint):
            self.write(fingerprint, store.to_trace())
        return self.path(fingerprint)

    def load_locked(
        self, fingerprint: str, shape: tuple[int, int, int], budget_bytes: int = DEFAULT_BUDGET_BYTES
    ) -> tuple[HistoryStore, Path | None]:
        """What is on disk now, to add to it while it is ``locked``.

        Returns the store, and the new path of the file if that was damaged and had to be set aside, else None.

        Raises:
            TraceReadError: it cannot be read at present, and must not be replaced.
            OSError: it cannot be set aside.
        """
        seen = self.version(fingerprint)
        try:
            return self._load(fingerprint, shape, budget_bytes), None
        except TraceReadError:
            raise
        except TraceError as error:
            aside = set_aside(self.path(fingerprint), seen)
            if aside is None:
                raise TraceReadError(f"{error}; it changes while it is read") from error
            return HistoryStore(shape, budget_bytes), aside

    def _load(self, fingerprint: str, shape: tuple[int, int, int], budget_bytes: int) -> HistoryStore:
        path, store = self.path(fingerprint), HistoryStore(shape, budget_bytes)
        try:
            if self.version(fingerprint) is None:
                return store
        except OSError as error:
            raise TraceReadError(f"{path}: cannot be read ({error.strerror})") from error
        trace = self.read(fingerprint)
        if trace.shape != shape:
            raise TraceError(f"{path}: holds maps of shape {trace.shape}, the model has {shape}")
        store.extend(trace.requests())
        return store

    def _set_aside(self, fingerprint: str, shape: tuple[int, int, int]) -> str:
        """Rename the file if it still cannot be used; what became of it, in words."""
        try:
            with self.locked(fingerprint):
                aside = self.load_locked(fingerprint, shape)[1]
        except (OSError, TraceReadError) as error:
            return f"it cannot be set aside ({error})"
        return "another process has replaced it" if aside is None else f"set aside as {aside}"
