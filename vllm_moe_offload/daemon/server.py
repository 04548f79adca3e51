"""Accepts the daemon's peers, runs a session for each, and ends when it is stopped or no longer used.

It decides who may come in and how many; what they may ask is ``session``'s, what they get is the models'.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time

import msgspec

from ..ipc.credentials import Peer, peer_of
from ..ipc.protocol import Refused, Request, StatusReport
from ..ipc.transport import Channel, PeerError
from ..threads import ReportedThread, failed_threads
from .histories import DaemonHistories
from .session import MAX_FDS, Models, Session
from .socket_file import SocketFile

logger = logging.getLogger(__name__)

MAX_PEERS = 256
COMPLAINT_SECONDS = 10.0
"""Between two lines about peers that were refused."""

_BREATH_SECONDS = 0.1
_JOIN_SECONDS = 10.0


class DaemonServer:
    """Serves ``models`` at a claimed socket; ``serve`` blocks until ``stop``.

    Args:
        socket_file: where peers come in.
        models: what they come for; whoever made them closes them, and the histories.
        histories: what they remember together.
        budget_bytes: for ``status``.
        group: members of this group may come in too.
        leave_after: seconds without any engine after which ``serve`` returns; None to stay for ever.
    """

    def __init__(
        self,
        socket_file: SocketFile,
        models: Models,
        histories: DaemonHistories,
        budget_bytes: int,
        group: int | None,
        leave_after: float | None,
    ) -> None:
        self.models = models
        self.histories = histories
        self.refused = 0
        """Peers sent away."""
        self._socket_file = socket_file
        self._budget_bytes = budget_bytes
        self._group = group
        self._leave_after = leave_after
        self._started = self._alone_since = time.monotonic()
        self._wakeup_send, self._wakeup_recv = socket.socketpair()
        self._wakeup_send.setblocking(False)
        self._lock = threading.Lock()
        self._sessions: dict[Session, threading.Thread] = {}
        self._accepted = 0
        self._complained = -COMPLAINT_SECONDS
        self._unsaid = 0
        self._stop_reason = ""

    def stop(self, reason: str) -> None:
        """Make ``serve`` return; from any thread or signal handler."""
        self._stop_reason = self._stop_reason or reason
        self._wake_up()

    def status(self) -> StatusReport:
        models = self.histories.with_sizes(self.models.status())
        return StatusReport(os.getpid(), time.monotonic() - self._started, self._budget_bytes, models, failed_threads())

    def serve(self) -> str:
        """Serve until told to stop or nobody is left; then no peer and no thread remains. Returns why it ended."""
        listener = self._socket_file.listener
        listener.setblocking(False)
        events = select.poll()
        events.register(listener, select.POLLIN)
        events.register(self._wakeup_recv, select.POLLIN)
        self._alone_since = time.monotonic()
        woken_by_signals = threading.current_thread() is threading.main_thread()
        if woken_by_signals:
            # a handler alone would not run for a signal that comes just before the wait
            signal.set_wakeup_fd(self._wakeup_send.fileno(), warn_on_full_buffer=False)
        try:
            while not self._stop_reason:
                left = self._seconds_left()
                ready = {fd for fd, _ in events.poll(None if left is None else max(left, 0) * 1000)}
                if self._wakeup_recv.fileno() in ready:
                    self._wakeup_recv.recv(4096)
                if listener.fileno() in ready:
                    self._accept(listener)
                elif not ready and left is not None and left <= 0:
                    self._stop_reason = f"no engine was attached for {self._leave_after:g} s"
        finally:
            if woken_by_signals:
                signal.set_wakeup_fd(-1)
            self._socket_file.remove()
            self._disconnect_all()
        return self._stop_reason

    def _disconnect_all(self) -> None:
        """End every connection. Engines keep what they have: of requests that end while the histories are written, and
        of experts, which they are served until then."""
        try:
            self._disconnect("history")
            self.histories.save()
        finally:
            self.models.freeze()
            self._disconnect("history", "worker", "control", "")
            self._wakeup_send.close()
            self._wakeup_recv.close()

    def _seconds_left(self) -> float | None:
        """Until the daemon leaves for want of engines; None while there is a reason to stay."""
        if self._leave_after is None:
            return None
        with self._lock:
            if any(session.keeps_daemon for session in self._sessions):
                return None
            return self._alone_since + self._leave_after - time.monotonic()

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            self._complain(f"cannot accept a connection: {error.strerror}")
            # Out of descriptors or memory: others must end first, and the listener would not stop being ready.
            time.sleep(_BREATH_SECONDS)
            return
        try:
            peer = peer_of(connection)
            channel = Channel(connection, msgspec.msgpack.Decoder(Request), MAX_FDS)
        except OSError as error:
            connection.close()
            self._complain(f"refused a peer: the system does not say who it is ({error.strerror})")
            return
        if reason := self._objection(peer):
            self._turn_away(channel, peer, reason)
        else:
            self._admit(channel, peer)

    def _objection(self, peer: Peer) -> str | None:
        if not peer.is_us() and not (self._group is not None and peer.belongs_to(self._group)):
            return f"is {peer}; the daemon serves user {os.geteuid()} and the members of the group given with --group"
        if len(self._sessions) >= MAX_PEERS:
            return f"came while {MAX_PEERS} others are connected, which is as many as the daemon serves"
        return None

    def _turn_away(self, channel: Channel[Request], peer: Peer, reason: str) -> None:
        try:
            channel.send(Refused(f"the peer {reason}"))
        except (PeerError, OSError):
            pass
        finally:
            channel.close()
        self._complain(f"refused {peer}: the peer {reason}")

    def _admit(self, channel: Channel[Request], peer: Peer) -> None:
        self._accepted += 1
        session = Session(channel, peer, self)
        name = f"peer {self._accepted} (pid {peer.pid})"
        thread = ReportedThread(target=self._run, args=(session, peer), name=name, daemon=True)
        with self._lock:
            self._sessions[session] = thread
        try:
            thread.start()
        except RuntimeError as error:
            with self._lock:
                del self._sessions[session]
            self._turn_away(channel, peer, f"cannot be served now: {error}")

    def _run(self, session: Session, peer: Peer) -> None:
        try:
            refusal = session.run()
            if refusal:
                self._complain(f"refused {peer}: the peer {refusal}")
        finally:
            with self._lock:
                del self._sessions[session]
                if session.keeps_daemon:
                    self._alone_since = time.monotonic()
            self._wake_up()

    def _complain(self, text: str) -> None:
        """Say it, unless something was said a moment ago: a peer must not fill the log."""
        with self._lock:
            self.refused += 1
            self._unsaid += 1
            if time.monotonic() - self._complained < COMPLAINT_SECONDS:
                logger.debug(text)
                return
            others = f" ({self._unsaid - 1} more since the last such line)" if self._unsaid > 1 else ""
            self._complained, self._unsaid = time.monotonic(), 0
        logger.warning("%s%s", text, others)

    def _disconnect(self, *roles: str) -> None:
        """Returns when the threads of these connections have ended."""
        with self._lock:
            ending = [(session, thread) for session, thread in self._sessions.items() if session.role in roles]
        for session, _ in ending:
            session.disconnect()
        for _, thread in ending:
            thread.join(_JOIN_SECONDS)
            if thread.is_alive():
                logger.error("%s does not end; leaving without it", thread.name)

    def _wake_up(self) -> None:
        """Let ``serve`` look again. A full socket wakes it already; a closed one has nobody to wake."""
        with contextlib.suppress(OSError):
            self._wakeup_send.send(b"!")
