"""An engine's or a person's connection to the daemon: ask and be answered. It must never wait without a limit."""

import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import overload

import msgspec

from ..errors import OffloadError
from ..ipc.credentials import peer_of
from ..ipc.protocol import (
    HISTORY_MESSAGE_BYTES,
    VERSION,
    Attach,
    Attached,
    Demand,
    Found,
    GetStatus,
    Hello,
    Hint,
    HistoryOpened,
    ImportSlots,
    OpenHistory,
    Refused,
    Remember,
    Remembered,
    Reply,
    Request,
    Search,
    SlotsImported,
    StatusReport,
    Stop,
    Stopping,
    Supplied,
    Welcome,
)
from ..ipc.transport import Channel, PeerError
from .trust import objection_to

MAX_FDS = 64
"""With one reply: two per pool of a model."""
LOOK_SECONDS = 5.0
"""Between two looks at whether an answer that may take long is still on its way."""

_REPLIES: dict[type, type] = {
    Hello: Welcome,
    Attach: Attached,
    Demand: Supplied,
    ImportSlots: SlotsImported,
    OpenHistory: HistoryOpened,
    Remember: Remembered,
    Search: Found,
    GetStatus: StatusReport,
    Stop: Stopping,
}


class DaemonGoneError(OffloadError):
    """No daemon answers, or none any more: it ended, hangs, or broke the protocol. The connection is of no use."""


class RefusedError(OffloadError):
    """The daemon will not do what it was asked; its reason."""


class UntrustedDaemonError(RefusedError):
    """Whoever listens is not somebody this user may take for its daemon."""


class Connection:
    """One connection to a daemon. Any thread may use it; requests wait for each other.

    A request that was not answered in time, or was interrupted, closes the connection: its answer could otherwise be
    taken for that of the next one.
    """

    def __init__(self, peer: socket.socket, name: str, timeout: float) -> None:
        """Of a connected socket; see ``connect``. ``name`` says in errors who is at the other end."""
        self.daemon_pid = 0
        """What the daemon calls itself, which may be another name in its container."""
        self.peer = peer_of(peer)
        """Who the daemon is, as the kernel says; its pid is 0 if it cannot be seen from here."""
        self._name = name
        self._channel: Channel[Reply] = Channel(peer, msgspec.msgpack.Decoder(Reply), MAX_FDS)
        self._channel.wait_at_most(timeout)
        self._asking = threading.Lock()
        self._sending = threading.Lock()

    @classmethod
    def connect(cls, path: Path, role: str, timeout: float) -> "Connection":
        """Connect to the daemon at a socket.

        Args:
            path: of the socket.
            role: ``worker``, ``history`` or ``control``: what will be asked.
            timeout: seconds that connecting, and later every answer, may take.

        Raises:
            DaemonGoneError: nobody listens at ``path``, or does not answer.
            RefusedError: the daemon does not want us, or is of another version.
            UntrustedDaemonError: it is another user's; nothing has been sent.
        """
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            peer.settimeout(timeout)
            peer.connect(str(path))
        except OSError as error:
            peer.close()
            if error.errno == errno.EPROTOTYPE:
                raise RefusedError(
                    f"the daemon at {path} is of another release of vllm-moe-offload (its socket is of another kind); "
                    "run the daemon and the engines with the same release"
                ) from None
            raise DaemonGoneError(
                f"no daemon answers at {path} ({error.strerror or error}); start one with `vllm-moe-offload daemon`"
            ) from None
        try:
            connection = cls(peer, f"the daemon at {path}", timeout)
        except OSError as error:
            peer.close()
            raise UntrustedDaemonError(
                f"the system does not say who the daemon at {path} is ({error.strerror})"
            ) from None
        try:
            if objection := objection_to(connection.peer, path):
                raise UntrustedDaemonError(f"the daemon at {path} is not trusted: {objection}")
            connection.daemon_pid = connection.request(Hello(VERSION, role)).pid
            if role == "history":
                connection._channel.limit = HISTORY_MESSAGE_BYTES
        except BaseException:
            connection.close()
            raise
        return connection

    @overload
    def request(self, message: Hello) -> Welcome: ...
    @overload
    def request(self, message: Attach, *, goes_on: Callable[[], None] | None = None) -> Attached: ...
    @overload
    def request(self, message: Demand) -> Supplied: ...
    @overload
    def request(self, message: ImportSlots, fds: Sequence[int]) -> SlotsImported: ...
    @overload
    def request(self, message: OpenHistory) -> HistoryOpened: ...
    @overload
    def request(self, message: Remember) -> Remembered: ...
    @overload
    def request(self, message: Search) -> Found: ...
    @overload
    def request(self, message: GetStatus) -> StatusReport: ...
    @overload
    def request(self, message: Stop) -> Stopping: ...

    def request(self, message: Request, fds: Sequence[int] = (), *, goes_on: Callable[[], None] | None = None) -> Reply:
        """Send a message, with descriptors that stay ours, and wait for its reply.

        Args:
            goes_on: called every few seconds for as long as no reply comes, however long that takes; what it raises
                ends the waiting and the connection.

        Raises:
            RefusedError: the daemon says no. It may have closed the connection, which the next request would find.
            DaemonGoneError: there was no (sensible) reply in time. The connection is closed.
        """
        with self._asking:
            reply = self._exchange(message, fds, goes_on)
            if isinstance(reply, Refused):
                raise RefusedError(f"{self._name} refuses: {reply.reason}")
            if reply is None or type(reply) is not _REPLIES[type(message)]:
                raise self._gone("closed the connection" if reply is None else f"answered with {type(reply).__name__}")
            return reply

    def send(self, message: Hint) -> None:
        """Send a message that has no reply.

        Raises:
            DaemonGoneError: there is nobody to read it. The connection is closed.
        """
        try:
            self._send(message, ())
        except (PeerError, OSError) as error:
            raise self._gone(_reason(error)) from None

    def wait_at_most(self, seconds: float) -> None:
        """How long every answer may take from now on."""
        self._channel.wait_at_most(seconds)

    def take_fds(self) -> list[int]:
        """The descriptors that came with the last reply; they are the caller's to close now."""
        return self._channel.take_fds()

    def close(self) -> None:
        """End the connection, also under a request that waits in another thread (it raises ``DaemonGoneError``)."""
        self._channel.shut_down()
        with self._asking, self._sending:
            self._channel.close()

    def _exchange(self, message: Request, fds: Sequence[int], goes_on: Callable[[], None] | None) -> Reply | None:
        try:
            # Who closed the connection may have said why before; reading on finds it.
            with contextlib.suppress(ConnectionError):
                self._send(message, fds)
            while goes_on is not None and not self._channel.comes_within(LOOK_SECONDS):
                goes_on()
            return self._channel.receive()
        except (PeerError, OSError) as error:
            raise self._gone(_reason(error)) from None
        except BaseException:
            self._channel.shut_down()
            raise

    def _send(self, message: Request, fds: Sequence[int]) -> None:
        with self._sending:
            self._channel.send(message, fds)

    def _gone(self, reason: str) -> DaemonGoneError:
        self._channel.shut_down()
        return DaemonGoneError(f"{self._name} {reason}")


def _reason(error: Exception) -> str:
    return f"is gone ({error.strerror})" if isinstance(error, OSError) else str(error)
