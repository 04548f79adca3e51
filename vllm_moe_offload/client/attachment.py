"""A worker's attachment to one daemon: its connection, and the memory that came with it until that is mapped.

It must never wait without end for a daemon that has stopped working.
"""

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ..ipc.arena import Arena, arena_bytes
from ..ipc.death import Death
from ..ipc.protocol import Attach, Attached, GetStatus
from ..ipc.shm import check_descriptor, whole_pages
from ..ipc.table import ResidencyTable
from ..stats import Stats
from ..store.pools import PoolMembers
from .connection import Connection, DaemonGoneError
from .remote_pool import RemotePool

CONNECT_SECONDS = 5.0
STATUS_SECONDS = 15.0
STALLED_SECONDS = 60.0
"""A lease is granted when every expert has been read, however long that takes. The longest time without any read."""
ANSWER_SECONDS = 30.0
"""A demand that takes longer is not worth waiting for: this process can read by itself."""


class Attachment:
    """What a daemon answered to ``Attach``, checked. Make one with ``open``; ``close`` detaches."""

    def __init__(self, connection: Connection, reply: Attached, arenas: list[int], tables: list[ResidencyTable]):
        self.connection = connection
        self.death = Death(connection.peer.pid)
        self.lease = reply.lease
        """Whether every expert stays in the slot of its own number."""
        self.tables = tables
        self._worker = reply.worker
        self._arenas = deque(arenas)

    @classmethod
    def open(
        cls, path: Path, request: Attach, members: Sequence[PoolMembers], closing: threading.Event
    ) -> "Attachment":
        """Attach to the daemon at a socket.

        Args:
            members: of the pools, as the protocol numbers them.
            closing: set when nobody wants the answer any more.

        Raises:
            DaemonGoneError: no daemon answers, or it stopped working on the answer, or nobody wants it.
            RefusedError: it cannot serve this model.
            PeerMemoryError: what it sent is not the memory it announced.
        """
        connection = Connection.connect(path, "worker", CONNECT_SECONDS)
        fds: list[int] = []
        tables: list[ResidencyTable] = []
        try:
            reply = connection.request(request, goes_on=_Progress(path, request.store, closing))
            fds = connection.take_fds()
            _check(path, reply, fds, members)
            for index, pool in enumerate(members):
                table_fd, fds[2 * index + 1] = fds[2 * index + 1], -1
                tables.append(ResidencyTable.attach(table_fd, pool.experts))
            connection.wait_at_most(ANSWER_SECONDS)
        except BaseException:
            connection.close()
            for fd in fds:
                if fd >= 0:
                    os.close(fd)
            for table in tables:
                table.close()
            raise
        return cls(connection, reply, fds[::2], tables)

    def take_arena(self) -> int:
        """The descriptor of the next pool's arena, the caller's now."""
        return self._arenas.popleft()

    def pools(self, arenas: Sequence[Arena], stats: Stats) -> list[RemotePool]:
        """What serves from ``arenas`` once they show this daemon's memory.

        Raises:
            DaemonGoneError: the daemon has detached this worker already.
            UnsupportedError: the kernel lacks membarrier(2).
        """
        tickets = itertools.count(1)
        return [
            RemotePool(self.connection, number, arena, table, self._worker, tickets, stats, self.lease)
            for number, (arena, table) in enumerate(zip(arenas, self.tables, strict=True))
        ]

    def stays_true(self, within_seconds: float) -> bool:
        """Whether what the tables show will be in the arenas for ever: the daemon has promised it, or is dead."""
        return all(table.frozen for table in self.tables) or self.death.known(within_seconds)

    def close(self) -> None:
        """Detach. Slots of the daemon that are still shared must not be read any more."""
        self.connection.close()
        self.death.close()
        for table in self.tables:
            table.close()
        while self._arenas:
            os.close(self._arenas.popleft())


class _Progress:
    """Called while an answer to ``Attach`` is awaited; raises ``DaemonGoneError`` where waiting on makes no sense."""

    def __init__(self, path: Path, store: str, closing: threading.Event):
        self._path, self._store, self._closing = path, store, closing
        self._loads = -1
        self._since = time.monotonic()

    def __call__(self) -> None:
        if self._closing.is_set():
            raise DaemonGoneError("this engine ends")
        control = Connection.connect(self._path, "control", CONNECT_SECONDS)
        control.wait_at_most(STATUS_SECONDS)
        try:
            report = control.request(GetStatus())
        finally:
            control.close()
        loads = sum(int(model.stats["loads"]) for model in report.models if model.store == self._store)
        if loads != self._loads:
            self._loads, self._since = loads, time.monotonic()
        elif time.monotonic() - self._since > STALLED_SECONDS:
            raise DaemonGoneError(
                f"the daemon at {self._path} has read nothing for {STALLED_SECONDS:g} s and does not attach this engine"
            )


def _check(path: Path, reply: Attached, fds: list[int], members: Sequence[PoolMembers]) -> None:
    ours = [(pool.experts, arena_bytes(pool.layout, pool.experts)) for pool in members]
    theirs = [(pool.experts, pool.arena_bytes) for pool in reply.pools]
    if ours != theirs or len(fds) != 2 * len(ours):
        raise DaemonGoneError(
            f"the daemon at {path} answers for another model: {theirs} with {len(fds)} descriptors, instead of {ours}"
        )
    for fd, (_, nbytes) in zip(fds[::2], ours, strict=True):
        check_descriptor(fd, whole_pages(nbytes))
