"""One peer's connection to the daemon, from Hello to the end: what may be asked when, and by whom.

Whatever a peer does, its session ends alone: refused with a reason where it can still be told, detached, closed.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ..errors import OffloadError
from ..ipc.credentials import Peer
from ..ipc.protocol import (
    HISTORY_MESSAGE_BYTES,
    VERSION,
    Attach,
    Demand,
    Found,
    GetStatus,
    Hello,
    Hint,
    HistoryOpened,
    ImportSlots,
    ModelStatus,
    OpenHistory,
    Refused,
    Remember,
    Remembered,
    Request,
    Search,
    SlotsImported,
    StatusReport,
    Stop,
    Stopping,
    Supplied,
    Welcome,
)
from ..ipc.trace_codec import pack_trace, unpack_embedding, unpack_trace
from ..ipc.transport import PEER_SECONDS, Channel, PeerError
from .histories import DaemonHistories
from .history import DaemonHistory

if TYPE_CHECKING:
    from .workers import Worker  # reads stores, which a daemon that finds another one running never does

ROLES: dict[str, tuple[type, ...]] = {
    "worker": (Attach, Demand, Hint, ImportSlots),
    "history": (OpenHistory, Remember, Search),
    "control": (GetStatus, Stop),
}
"""What may be asked on a connection, by the role its Hello named."""

MAX_FDS = 1
"""A peer may send at a time; ImportSlots brings one."""


class Models(Protocol):
    """What the daemon hosts; used by many threads at once."""

    def attach(self, request: Attach) -> "Worker":
        """Raises ``OffloadError`` with the reason and the fix if the worker cannot be served."""

    def status(self) -> list[ModelStatus]: ...
    def freeze(self) -> None:
        """The daemon ends: what attached workers read stays as it is, whatever becomes of their connections."""

    def close(self) -> None: ...


class Daemon(Protocol):
    """What a session may do with the daemon as a whole."""

    models: Models
    histories: DaemonHistories

    def status(self) -> StatusReport: ...
    def stop(self, reason: str) -> None: ...


class Session:
    """The server's end of one connection; ``run`` on a thread of its own.

    It owns the connection, and what was opened on it: an attached worker, or the use of a history. When ``run``
    returns, all of it is closed.
    """

    def __init__(self, channel: Channel[Request], peer: Peer, daemon: Daemon) -> None:
        self.role = ""
        """As its Hello says; empty before that."""
        self._channel = channel
        self._peer = peer
        self._daemon = daemon
        self._worker: Worker | None = None
        self._history: DaemonHistory | None = None

    @property
    def keeps_daemon(self) -> bool:
        """Whether the daemon is needed: by an engine, or by a peer that has not said yet what it is."""
        return self.role != "control"

    def run(self) -> str | None:
        """Answer the peer until the connection ends, and close it.

        Returns:
            Why the peer was refused; None if it left on its own.
        """
        try:
            self._welcome()
            while (request := self._channel.receive()) is not None:
                self._answer(request)
            return None
        except (PeerError, ValueError) as error:
            self._refuse(str(error))
            return str(error)
        except OSError:
            return None
        finally:
            if self._worker is not None:
                self._worker.detach()
            if self._history is not None:
                self._daemon.histories.leave(self._history)
            self._channel.close()

    def disconnect(self) -> None:
        """End the connection, from another thread: ``run`` returns soon."""
        self._channel.shut_down()

    def _welcome(self) -> None:
        self._channel.wait_at_most(PEER_SECONDS)
        hello = self._channel.receive()
        if hello is None:
            raise ConnectionResetError
        if not isinstance(hello, Hello):
            raise PeerError(f"sent {type(hello).__name__} before Hello")
        if hello.version != VERSION:
            raise PeerError(
                f"speaks version {hello.version} of the protocol and this daemon version {VERSION}; "
                "run the daemon and the engines with the same release of vllm-moe-offload"
            )
        if hello.role not in ROLES:
            raise PeerError(f"wants the role {hello.role!r}; there are {', '.join(ROLES)}")
        self.role = hello.role
        self._channel.wait_at_most(0)
        if hello.role == "history":
            self._channel.limit = HISTORY_MESSAGE_BYTES
            self._channel.large = self._daemon.histories.large
        self._channel.send(Welcome(VERSION, os.getpid()))

    def _answer(self, request: Request) -> None:
        if not isinstance(request, ROLES[self.role]):
            allowed = ", ".join(kind.__name__ for kind in ROLES[self.role])
            raise PeerError(f"sent {type(request).__name__} on a connection for {allowed}")
        if isinstance(request, Demand):
            self._reply(self._attached(request).demand, request)
        elif isinstance(request, Hint):
            self._attached(request).hint(request)
        elif isinstance(request, Attach):
            self._attach(request)
        elif isinstance(request, ImportSlots):
            self._import_slots(request)
        elif isinstance(request, OpenHistory):
            self._open_history(request)
        elif isinstance(request, Remember):
            self._remember(request)
        elif isinstance(request, Search):
            self._search(request)
        elif isinstance(request, GetStatus):
            self._channel.send(self._daemon.status())
        elif isinstance(request, Stop):
            self._stop()

    def _attach(self, request: Attach) -> None:
        if self._worker is not None:
            raise PeerError("sent Attach a second time")
        # The kernel knows better who asks, unless it lives in a container.
        request = msgspec.structs.replace(request, pid=self._peer.pid or request.pid)
        try:
            self._worker = self._daemon.models.attach(request)
        except OffloadError as error:
            self._channel.send(Refused(str(error)))
        else:
            self._channel.send(self._worker.reply, self._worker.fds)

    def _import_slots(self, request: ImportSlots) -> None:
        worker = self._attached(request)
        fds = self._channel.take_fds()
        if not fds:
            raise PeerError("sent ImportSlots without the descriptor of an arena")
        self._reply(partial(worker.import_slots, fd=fds[0]), request)

    def _open_history(self, request: OpenHistory) -> None:
        if self._history is not None:
            raise PeerError("sent OpenHistory a second time")
        try:
            self._history = history = self._daemon.histories.open(request)
        except OffloadError as error:
            self._channel.send(Refused(str(error)))
        else:
            self._channel.send(HistoryOpened(history.size, None if history.folder is None else str(history.folder)))

    def _remember(self, request: Remember) -> None:
        history = self._opened(request)
        history.remember(unpack_trace(request.trace, history.shape), request.maybe_duplicate, self._peer.uid)
        self._daemon.histories.keep_within_bounds()
        self._channel.send(Remembered(history.size))

    def _search(self, request: Search) -> None:
        history = self._opened(request)
        self._channel.hold_large(PEER_SECONDS)
        found = history.search(unpack_embedding(request.embedding), request.max_tokens, self._peer.uid)
        self._channel.send(Found(pack_trace(found), history.size))

    def _reply(self, verb: Callable[[Any], Supplied | SlotsImported], request: Request) -> None:
        reply: Supplied | SlotsImported | Refused
        try:
            reply = verb(request)
        except OffloadError as error:
            reply = Refused(str(error))
        self._channel.send(reply)

    def _stop(self) -> None:
        if not self._peer.is_us():
            self._channel.send(Refused("only the user the daemon runs as may stop it"))
            return
        self._channel.send(Stopping())
        self._daemon.stop(f"{self._peer} asked for it")

    def _attached(self, request: Request) -> "Worker":
        if self._worker is None:
            raise PeerError(f"sent {type(request).__name__} before Attach")
        return self._worker

    def _opened(self, request: Request) -> DaemonHistory:
        if self._history is None:
            raise PeerError(f"sent {type(request).__name__} before OpenHistory")
        return self._history

    def _refuse(self, reason: str) -> None:
        try:
            self._channel.send(Refused(f"the peer {reason}"))
        except (PeerError, OSError):
            return
