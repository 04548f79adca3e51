"""Histories on disk: one folder per model fingerprint, written whole, loaded only if sound and of that very model.

What cannot be used is never deleted: it is renamed with the reason in its name, and the engine starts empty.
"""

import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import TraceError
from .store import DEFAULT_BUDGET_BYTES, HistoryStore
from .trace import Trace
from .trace_file import read_trace, write_trace

HISTORY_FILE = "history.npz"


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
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                return None
        except OSError as error:
            return str(error)

    def entries(self) -> Iterator[HistoryEntry]:
        """All histories found, by fingerprint."""
        for path in sorted(self.directory.glob(f"*/{HISTORY_FILE}")):
            yield HistoryEntry(path.parent.name, path, path.stat().st_size)

    def load(
        self, fingerprint: str, shape: tuple[int, int, int], budget_bytes: int = DEFAULT_BUDGET_BYTES
    ) -> tuple[HistoryStore, str | None]:
        """The history of a model, empty when there is none.

        Returns the store, and what was wrong with the file when it had to be set aside, else None.
        """
        store = HistoryStore(shape, budget_bytes)
        path = self.path(fingerprint)
        if not path.exists():
            return store, None
        try:
            trace = self._read(path, fingerprint)
            if trace.shape != shape:
                raise TraceError(f"{path}: holds maps of shape {trace.shape}, the model has {shape}")
        except TraceError as error:
            return store, f"{error}; set aside as {_set_aside(path)}"
        store.extend(trace.requests())
        return store, None

    def outline(self, fingerprint: str) -> tuple[int, tuple[int, int, int]] | None:
        """Tokens a model's history holds and the shape of their maps, without reading them; None if that fails."""
        try:
            with zipfile.ZipFile(self.path(fingerprint)) as archive:
                with archive.open("experts.npy") as file:
                    np.lib.format.read_magic(file)
                    (tokens, layers, top_k), _, _ = np.lib.format.read_array_header_1_0(file)
                with archive.open("num_experts.npy") as file:
                    experts = int(np.lib.format.read_array(file, allow_pickle=False))
            return tokens, (layers, experts, top_k)
        except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def read(self, fingerprint: str) -> Trace:
        """The stored trace, for export.

        Raises:
            TraceError: there is none, or it is damaged or of another model; the file stays where it is.
        """
        return self._read(self.path(fingerprint), fingerprint)

    def save(self, fingerprint: str, store: HistoryStore) -> Path:
        """Write a history so that a crash leaves the old one or the new one."""
        path = self.path(fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_trace(path, replace(store.to_trace(), fingerprint=fingerprint), compress=False)
        return path

    def _read(self, path: Path, fingerprint: str) -> Trace:
        trace = read_trace(path)
        if trace.fingerprint != fingerprint:
            raise TraceError(f"{path}: belongs to model {trace.fingerprint or 'unknown'!r}, not to {fingerprint!r}")
        return trace


def _set_aside(path: Path) -> Path:
    number = 0
    while (aside := path.with_name(f"{path.name}.unusable-{os.getpid()}-{number}")).exists():
        number += 1
    return path.rename(aside)
