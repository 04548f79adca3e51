"""``--moe-offload-trace FILE``: all requests of an engine, as a trace file that grows while it serves."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import TraceError
from ..sizes import size_text
from .trace import Trace, concat
from .trace_file import LogHeader, decode_log_header, encode_log_header, encode_trace
from .trace_log import LogWriter, refuse_unwritable

logger = logging.getLogger(__name__)

MOST_BYTES = 4 << 30
"""Of the file. Replay reads it whole."""
MOST_WAITING_BYTES = 64 << 20
"""Of requests that could not be written yet, because the disk is full, say."""


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what a log cannot be used for into a TraceError that names the setting."""
    try:
        yield
    except BlockingIOError:
        raise TraceError(f"trace = {path} is being written by another engine; give each a file of its own") from None
    except OSError as error:
        raise TraceError(f"trace = {path} cannot be written ({error.strerror or error})") from error
    except ValueError as error:
        raise TraceError(f"trace = {path}: {error}; give another file, or move that one away") from None


def refuse_unusable_file(path: Path) -> None:
    """See, without reading or making it, that a trace can be recorded in ``path``.

    Raises:
        TraceError: it holds something else, or cannot be written.
    """
    with _explained(path):
        refuse_unwritable(path)


class TraceRecording:
    """Appends the requests that have ended to a file. What is written takes no memory any more.

    A file of the same model is continued, so that a restart loses nothing.

    Args:
        shape: layers, experts per layer, experts per token.
        model: what people call it.
        fingerprint: of its weights.

    Raises:
        TraceError: the file is there and is not a trace of this model, is being written by another engine, or cannot be
            written.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], model: str, fingerprint: str):
        self.path = path
        self._shape = shape
        self._waiting: list[Trace] = []
        self._waiting_bytes = 0
        self._complete = True
        """Whether every request has been recorded."""
        self._failing: str | None = None
        """Why the last write failed."""
        header = LogHeader(model, fingerprint, shape)
        with _explained(path):
            self._log = LogWriter(path)
            if self._log.first is None:
                self._log.append(encode_log_header(header))
            else:
                self._check(decode_log_header(self._log.first), header)
        if self._log.dropped:
            logger.warning(
                "%s: the last %d bytes had not been written to the end and are dropped", path, self._log.dropped
            )

    def add(self, request: Trace) -> None:
        """A request has ended. In the file after the next ``write``."""
        nbytes = request.experts.nbytes + request.weights.nbytes
        if self._log.nbytes + self._waiting_bytes + nbytes > MOST_BYTES:
            self._stop(f"it has reached its largest size, {size_text(MOST_BYTES)}")
        elif self._waiting_bytes + nbytes > MOST_WAITING_BYTES and self._waiting:
            self._stop(f"{size_text(MOST_WAITING_BYTES)} wait to be written already")
        else:
            self._waiting.append(request)
            self._waiting_bytes += nbytes

    def write(self) -> None:
        """Append the requests that have ended since the last time.

        Raises:
            TraceError: the file cannot be written at present; the requests wait for the next time. Raised once for a
                reason that persists.
        """
        requests = list(self._waiting)
        if not requests:
            return
        try:
            self._log.append(encode_trace(concat(requests, self._shape)))
        except OSError as error:
            if error.strerror == self._failing:
                return
            self._failing = error.strerror
            raise TraceError(f"trace = {self.path} cannot be written ({error.strerror})") from error
        self._failing = None
        del self._waiting[: len(requests)]
        self._waiting_bytes = sum(request.experts.nbytes + request.weights.nbytes for request in self._waiting)

    def close(self) -> None:
        """Write what is left and let go of the file. Raises TraceError."""
        try:
            self.write()
        finally:
            try:
                self._log.close()
            except OSError as error:
                raise TraceError(f"trace = {self.path} cannot be written ({error.strerror})") from error

    def _check(self, found: LogHeader, wanted: LogHeader) -> None:
        if found.fingerprint != wanted.fingerprint or found.shape != wanted.shape:
            raise ValueError(f"it is a trace of {found.model or 'an unknown model'}")

    def _stop(self, reason: str) -> None:
        if self._complete:
            self._complete = False
            logger.warning("requests are missing from the trace %s from now on: %s", self.path, reason)
