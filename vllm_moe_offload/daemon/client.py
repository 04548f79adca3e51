"""One worker's life with the daemon: it attaches, goes on alone when that is gone, and comes back to the next one.

The kernels keep the addresses they were given once; what lies behind them changes. It must never believe the contents
of shared memory that a process which may be alive could still write.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..cache import ExpertCache, create_policy
from ..cache.cache import ABSENT
from ..errors import OffloadError
from ..prefetch.loader import RecordLoader
from ..slots.base import SlotPool
from ..slots.embedded import EmbeddedPool
from ..slots.ledger import Ledger
from ..store.layout import RecordLayout
from ..store.pools import PoolMembers, pools_of
from ..store.reader import Store
from .arena import Arena, arena_bytes
from .attached_pool import AttachedPool
from .connection import Connection, DaemonGoneError, RefusedError
from .death import Death
from .protocol import Adopt, Attach, Attached, pack_ids
from .surviving_pool import SurvivingPool
from .table import ResidencyTable

CONNECT_SECONDS = 5.0
ATTACH_SECONDS = 1800.0
"""A lease is granted when every expert has been read."""
ANSWER_SECONDS = 30.0
"""A demand that takes longer is not worth waiting for: this process can read by itself."""
RETRY_SECONDS = 1.0
GRUDGE_SECONDS = 30.0
"""How long a daemon that lives but did not serve is left alone."""
_DYING_SECONDS = 2.0


class _Attachment(NamedTuple):
    """To one daemon."""

    connection: Connection
    death: Death
    reply: Attached
    arenas: list[int]
    """Descriptors, whoever maps them takes them over."""
    tables: list[ResidencyTable]

    def leave(self) -> None:
        """After the arenas have been mapped; their slots must not be read any more."""
        self.connection.close()
        self.death.close()
        for table in self.tables:
            table.close()

    def decline(self) -> None:
        """Before the arenas have been mapped."""
        self.leave()
        for fd in self.arenas:
            os.close(fd)


class DaemonClient:
    """Keeps the pools of one worker.

    Args:
        path: of the daemon's socket.
        request: what to attach to.
        store: of the model; read from when the daemon is gone, and not closed here.
        policy: name of the eviction policy while there is no daemon.
        io_cpus: where loader threads may run then; None leaves them where the process runs.
        ledger: the worker's books.
        say: told in a sentence what an operator would want to know.

    Raises:
        DaemonGoneError: no daemon answers at ``path``.
        RefusedError: it cannot serve this model.
    """

    def __init__(
        self,
        path: Path,
        request: Attach,
        store: Store,
        policy: str,
        io_cpus: set[int] | None,
        ledger: Ledger,
        say: Callable[[str], None],
    ):
        self._path, self._request, self._store = path, request, store
        self._policy, self._io_cpus, self._ledger, self._say = policy, io_cpus, ledger, say
        self._members = pools_of(store.layers)
        """Of the pools, as the protocol numbers them."""
        attachment = self._attach()
        self._current: _Attachment | None = attachment
        self._tables = attachment.tables
        """Of the daemon attached to last."""
        self.lease = attachment.reply.lease
        """Whether every expert stays in the slot of its own number."""
        self._arenas = [
            Arena.attach(fd, members.layout, members.experts)
            for fd, members in zip(attachment.arenas, self._members, strict=True)
        ]
        self._attached = self._attached_pools(attachment)
        """Pools of the daemon attached to last."""
        self._pools = [
            SurvivingPool(arena, pool, self.fail_over) for arena, pool in zip(self._arenas, self._attached, strict=True)
        ]
        self._trusted = True
        """Whether what the tables say of the arenas is true, or was when the daemon died."""
        self._next: _Attachment | None = None
        self._not_before = 0.0
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="moe-offload-daemon-watch", daemon=True)
        self._watcher.start()

    @property
    def pools(self) -> dict[RecordLayout, SlotPool]:
        """By record layout."""
        return {members.layout: pool for members, pool in zip(self._members, self._pools, strict=True)}

    @property
    def daemon_pid(self) -> int:
        """Of the daemon that keeps the slots; 0 while there is none."""
        return 0 if self._current is None else self._current.connection.daemon_pid

    def begin_step(self) -> None:
        """Nothing is held: the moment to join a daemon that has come back."""
        if self._next is not None:
            self._come_back(self._next)
            self._next = None
        elif self.lease and self._current is not None and not all(pool.minded for pool in self._attached):
            self.fail_over(DaemonGoneError("the daemon has given up this worker"))
            if not self._trusted:
                for pool in self._pools:
                    pool.load_all()

    def fail_over(self, reason: OffloadError) -> None:
        """Go on without the daemon: slots become this process's own. Nothing may be held."""
        attachment, self._current = self._current, None
        if attachment is None:
            return
        self._trusted = attachment.death.known(_DYING_SECONDS)
        for arena in self._arenas:
            arena.mapping.become_private()
        loader = RecordLoader(self._store, cpus=self._io_cpus)
        kept = 0
        for members, arena, table, pool in zip(
            self._members, self._arenas, attachment.tables, self._pools, strict=True
        ):
            cache = self._own_cache(members, table.limit)
            if self._trusted:
                experts = np.flatnonzero(table.slot_of != ABSENT)
                cache.adopt(experts, table.slot_of[experts])
                kept += len(experts)
            pool.exchange(EmbeddedPool(members, arena, cache, loader, self._ledger))
        attachment.leave()
        if not self._trusted:
            self._not_before = time.monotonic() + GRUDGE_SECONDS
        self._say(f"{reason}; going on without it, with {kept} experts that were loaded")

    def close(self) -> None:
        """Leave the daemon."""
        self._closing.set()
        self._watcher.join()
        for pool in self._pools:
            pool.close()
        if self._current is not None:
            self._current.leave()
        if self._next is not None:
            self._next.decline()
        self._current = self._next = None
        for arena in self._arenas:
            arena.mapping.close()

    def _attach(self) -> _Attachment:
        connection = Connection.connect(self._path, "worker", CONNECT_SECONDS)
        try:
            connection.wait_at_most(ATTACH_SECONDS)
            reply = connection.request(self._request)
            fds = connection.take_fds()
            self._check(reply, fds)
            tables = [
                ResidencyTable.attach(fd, members.experts) for fd, members in zip(fds[1::2], self._members, strict=True)
            ]
            connection.wait_at_most(ANSWER_SECONDS)
        except BaseException:
            connection.close()
            raise
        return _Attachment(connection, Death(connection.peer_pid), reply, fds[::2], tables)

    def _check(self, reply: Attached, fds: list[int]) -> None:
        ours = [(members.experts, arena_bytes(members.layout, members.experts)) for members in self._members]
        theirs = [(pool.experts, pool.arena_bytes) for pool in reply.pools]
        if ours != theirs or len(fds) != 2 * len(ours):
            for fd in fds:
                os.close(fd)
            raise DaemonGoneError(
                f"the daemon at {self._path} answers for another model: {theirs} with {len(fds)} descriptors, "
                f"instead of {ours}"
            )

    def _attached_pools(self, attachment: _Attachment) -> list[AttachedPool]:
        worker, tickets = attachment.reply.worker, itertools.count(1)
        return [
            AttachedPool(attachment.connection, number, arena, table, worker, tickets, self._ledger)
            for number, (arena, table) in enumerate(zip(self._arenas, attachment.tables, strict=True))
        ]

    def _own_cache(self, members: PoolMembers, limit: int) -> ExpertCache:
        policy = create_policy(self._policy, members.layer_of)
        cache = ExpertCache(members.layer_of, members.experts, policy, at_home=True)
        cache.limit = limit
        return cache

    def _watch(self) -> None:
        """Look for a daemon whenever there is none. Runs in a thread of its own."""
        told = ""
        while not self._closing.wait(RETRY_SECONDS):
            current = self._current
            if self._next is not None or time.monotonic() < self._not_before:
                continue
            if current is not None and not current.death.known():
                continue
            try:
                self._next = self._attach_again()
            except DaemonGoneError:
                continue
            except OffloadError as error:
                self._not_before = time.monotonic() + GRUDGE_SECONDS
                if told != str(error):
                    told = str(error)
                    self._say(f"a daemon is back, but this engine goes on without it: {told}")

    def _attach_again(self) -> _Attachment:
        attachment = self._attach()
        try:
            if self.lease and not attachment.reply.lease:
                raise RefusedError("it has no room for every expert, which this engine relies on")
            self._offer_what_is_here(attachment)
        except BaseException:
            attachment.decline()
            raise
        return attachment

    def _offer_what_is_here(self, attachment: _Attachment) -> None:
        """Spare the new daemon reading what the last one had read."""
        if not self._trusted:
            return
        for number, (arena, table) in enumerate(zip(self._arenas, self._tables, strict=True)):
            experts = np.flatnonzero(table.slot_of != ABSENT)
            if len(experts):
                message = Adopt(number, pack_ids(experts), pack_ids(table.slot_of[experts]))
                attachment.connection.request(message, [arena.mapping.fd])

    def _come_back(self, attachment: _Attachment) -> None:
        for arena, fd in zip(self._arenas, attachment.arenas, strict=True):
            arena.mapping.replace(fd)
        self._attached = self._attached_pools(attachment)
        for pool, behind in zip(self._pools, self._attached, strict=True):
            pool.exchange(behind)
        if self._current is not None:
            self._current.leave()
        self._current, self._tables, self._trusted = attachment, attachment.tables, True
        self._say(f"attached to the daemon at {self._path} again")
