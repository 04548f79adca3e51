"""An engine's client of the history that the daemon keeps. It must never make a step wait: it has its own thread.

It goes on without a daemon, and brings the next one what this engine's latest requests have left.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import OffloadError
from ..ipc.protocol import Found, HistorySize, OpenHistory, Remember, Search
from ..ipc.trace_codec import pack_embedding, pack_trace, unpack_trace
from ..threads import ReportedThread
from ..trace.trace import Trace
from .connection import Connection, DaemonGoneError, RefusedError
from .outbox import Outbox

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
OPEN_SECONDS = 60.0
"""The daemon may have to load the history."""
ANSWER_SECONDS = 10.0
RETRY_SECONDS = 1.0
BACKOFF_SECONDS = 60.0
"""How long a daemon that refused is not asked again."""
QUIET_SECONDS = 10.0
"""Without anything to say, ask whether the daemon is still there and how much it knows by now."""
CLOSE_SECONDS = 5.0
"""For what is still to be sent when the engine ends."""
MOST_QUESTIONS = 64

Answered = Callable[[Trace | None], None]
"""Told what was found; None if nobody answers."""


class _Question(NamedTuple):
    search: Search
    answered: Answered


class HistoryClient:
    """Tells a daemon of requests that have ended and asks it for what resembles new ones.

    Args:
        path: of the daemon's socket.
        request: which history.
    """

    def __init__(self, path: Path, request: OpenHistory):
        self.size = HistorySize(0, 0)
        """Of the daemon's history, as it said last."""
        self.folder: Path | None = None
        """Where the daemon keeps it, in the daemon's own words."""
        self._path, self._request = path, request
        self._outbox = Outbox()
        self._questions: deque[_Question] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._told = ""
        self._retry_at = 0.0
        self._connection: Connection | None = None
        self._opening: Connection | None = None
        self._connect()
        self._thread = ReportedThread(target=self._work, name="moe-offload-history", daemon=True)
        self._thread.start()

    def tell(self, trace: Trace) -> None:
        """A request has ended. Returns at once."""
        self._outbox.put(trace)
        with self._wake:
            self._wake.notify()

    def ask(self, embedding: NDArray[np.floating] | None, max_tokens: int, answered: Answered) -> bool:
        """Search for what resembles a request and give it to ``answered``, from another thread. Returns at once.

        Returns whether there is somebody to ask.
        """
        with self._wake:
            if self._connection is None or self._closing or len(self._questions) >= MOST_QUESTIONS:
                return False
            self._questions.append(_Question(Search(pack_embedding(embedding), max_tokens), answered))
            self._wake.notify()
            return True

    def find(self, embedding: NDArray[np.floating] | None, max_tokens: int) -> Trace | None:
        """The same for who can wait for an answer; None if nobody answers."""
        return self._search(Search(pack_embedding(embedding), max_tokens))

    def close(self) -> None:
        """Send what is still to be sent, if that does not take long, and disconnect. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(CLOSE_SECONDS)
        for connection in (self._opening, self._connection):
            if connection is not None:
                connection.close()
        self._thread.join()
        self._disconnect()

    def _work(self) -> None:
        while self._wait_for_work():
            try:
                self._do_next()
            except Exception as error:  # whatever it is, the engine serves without, and asks again later
                self._disconnect()
                self._back_off(error)

    def _do_next(self) -> None:
        question = self._take_question()
        if question is not None:
            self._answer(question)
        elif self._connection is None:
            self._connect()
        elif self._outbox.empty:
            self._search(Search(b"", 0))
        else:
            self._send_next()

    def _answer(self, question: _Question) -> None:
        found: Trace | None = None
        try:
            found = self._search(question.search)
        finally:
            question.answered(found)

    def _wait_for_work(self) -> bool:
        """Until there is something to do; False if there will not be, because the engine ends."""
        quiet_until = time.monotonic() + QUIET_SECONDS
        with self._wake:
            while True:
                connected = self._connection is not None
                if connected and (self._questions or not self._outbox.empty):
                    return True
                left = (quiet_until if connected else self._retry_at) - time.monotonic()
                if self._closing or left <= 0:
                    return not self._closing
                self._wake.wait(left)

    def _take_question(self) -> _Question | None:
        with self._wake:
            return self._questions.popleft() if self._questions else None

    def _connect(self) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        try:
            connection = Connection.connect(self._path, "history", CONNECT_SECONDS)
        except DaemonGoneError:
            return
        except RefusedError as error:
            self._back_off(error)
            return
        self._opening = connection
        try:
            connection.wait_at_most(OPEN_SECONDS)
            opened = connection.request(self._request)
            connection.wait_at_most(ANSWER_SECONDS)
        except (DaemonGoneError, RefusedError) as error:
            connection.close()
            self._back_off(error)
            return
        finally:
            self._opening = None
        self.size = opened.size
        self.folder = None if opened.folder is None else Path(opened.folder)
        self._outbox.start_over()
        self._connection = connection

    def _send_next(self) -> None:
        upload, connection = self._outbox.next(), self._connection
        if upload is None or connection is None:
            return
        try:
            self.size = connection.request(Remember(pack_trace(upload.trace), upload.maybe_duplicate)).size
        except DaemonGoneError:
            self._disconnect()
        except (RefusedError, ValueError) as error:
            self._outbox.drop(upload.number)
            self._tell_once(f"a request is not remembered: {error}")
        else:
            self._outbox.delivered(upload.number)

    def _search(self, search: Search) -> Trace | None:
        connection = self._connection
        if connection is None:
            return None
        try:
            found = connection.request(search)
            return self._unpacked(found)
        except DaemonGoneError:
            self._disconnect()
        except (RefusedError, ValueError) as error:
            self._tell_once(f"no help from the history of the daemon: {error}")
        return None

    def _unpacked(self, found: Found) -> Trace:
        self.size = found.size
        return unpack_trace(found.trace, self._request.shape)

    def _disconnect(self) -> None:
        with self._wake:
            connection, self._connection = self._connection, None
            questions = list(self._questions)
            self._questions.clear()
            self._wake.notify()
        if connection is not None:
            connection.close()
        for question in questions:
            try:
                question.answered(None)
            except Exception as error:  # whoever asked is wrong, and the others wait
                self._tell_once(f"an answer of the history was not understood: {type(error).__name__}: {error}")

    def _back_off(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + BACKOFF_SECONDS
        reason = str(error) if isinstance(error, OffloadError) else f"{type(error).__name__}: {error}"
        self._tell_once(f"the daemon does not share its history with this engine: {reason}")

    def _tell_once(self, sentence: str) -> None:
        if sentence != self._told:
            self._told = sentence
            logger.warning(sentence)
