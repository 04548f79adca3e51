"""One worker's slots and the daemon they belong to, if there is one: the states of a client.

CONNECTED  the slots are memory of a daemon, which reads into them what this worker demands.
ALONE      the slots are this process's own: it reads from the store. The watching thread asks for a daemon every
           ``RETRY_SECONDS``, and after one that is there but does not serve this worker every ``BACKOFF_SECONDS``.
REJOINING  a daemon has attached this worker anew, and the next step begins with its memory. Until then slots are as in
           ALONE, or still those of the last daemon, if that died and nobody has missed it yet.
CLOSED     the engine ends.

CONNECTED            -> ALONE      ``fail_over``: the daemon does not answer, refuses, or has detached this worker
CONNECTED, ALONE     -> REJOINING  ``_watch``: a daemon has attached it (CONNECTED: the process of the last one is dead)
REJOINING            -> CONNECTED  ``begin_step``; also where that daemon has gone again and the last one is not missed
REJOINING            -> ALONE      ``begin_step``, where that daemon has gone again, or its memory cannot be mapped
any                  -> CLOSED     ``close``

The watching thread only enters REJOINING, everything else is up to the thread that computes. Kernels keep the addresses
that they were given once; what lies behind them changes where nothing is held. It must never trust the contents of
shared memory that a process which may be alive could still write.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path

import numpy as np

from ..cache import ExpertCache, create_policy
from ..cache.cache import ABSENT
from ..errors import OffloadError
from ..ipc import membarrier
from ..ipc.arena import Arena
from ..ipc.protocol import Attach, ImportSlots, pack_ids
from ..ipc.table import ResidencyTable
from ..pool.base import HostPool, PoolGoneError
from ..pool.loader import RecordLoader
from ..pool.local import LocalPool
from ..pool.operations import Operations
from ..stats import Stats
from ..store.pools import PoolMembers, pools_of
from ..store.reader import Store
from ..threads import ReportedThread
from .attachment import Attachment
from .connection import DaemonGoneError, RefusedError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
BACKOFF_SECONDS = 30.0
"""How long a daemon that lives but did not serve is not asked again."""
_DYING_SECONDS = 2.0


class ClientState(Enum):
    """See the module."""

    CONNECTED = "connected"
    ALONE = "alone"
    REJOINING = "rejoining"
    CLOSED = "closed"


CONNECTED, ALONE, REJOINING, CLOSED = ClientState
TRANSITIONS = {
    CONNECTED: {ALONE, REJOINING, CLOSED},
    ALONE: {REJOINING, CLOSED},
    REJOINING: {CONNECTED, ALONE, CLOSED},
    CLOSED: set[ClientState](),
}


class DaemonClient:
    """Keeps the pools of one worker.

    Args:
        path: of the daemon's socket.
        request: what to attach to.
        store: of the model; read from when the daemon is gone, and not closed here.
        policy: name of the eviction policy while there is no daemon.
        io_cpus: where loader threads may run then; None leaves them where the process runs.
        stats: the worker's.

    Raises:
        DaemonGoneError: no daemon answers at ``path``.
        RefusedError: it cannot serve this model, or is another user's.
        OffloadError: this system has no room for its memory, or forbids what sharing it takes.
    """

    def __init__(
        self,
        path: Path,
        request: Attach,
        store: Store,
        policy: str,
        io_cpus: set[int] | None,
        stats: Stats,
    ):
        membarrier.register()
        self.path, self._request, self._store = path, request, store
        self._policy, self._io_cpus, self._stats = policy, io_cpus, stats
        self._members = pools_of(store.layers)
        """Of the pools, as the protocol numbers them."""
        self._closing = threading.Event()
        attachment = self._attach()
        self._arenas: list[Arena] = []
        try:
            for members in self._members:
                self._arenas.append(Arena.attach(attachment.take_arena(), members.layout, members.experts))
            self._attached = attachment.pools(self._arenas, stats)
            """Pools of the daemon attached to last, as the protocol numbers them."""
        except BaseException:
            self._close_arenas()
            attachment.close()
            raise
        self.state = CONNECTED
        self._changing = threading.Lock()
        """Held while the state changes, and with it the next two."""
        self._attachment: Attachment | None = attachment
        """To the daemon whose memory the slots are."""
        self._successor: Attachment | None = None
        """To the daemon whose memory they will be: REJOINING."""
        self._tables = attachment.tables
        """Of the daemon attached to last."""
        self.lease = attachment.lease
        """Whether every expert stays in the slot of its own number."""
        self.pools: dict[str, HostPool] = self._by_layer(self._attached)
        """What serves now, by layer."""
        self._trusted = True
        """Whether what the tables say of the arenas is true, or was when the daemon ended."""
        self._retry_at = 0.0
        """On the monotonic clock: no daemon is asked before."""
        self._last_reason = ""
        self.before_exchange: Callable[[], None] = lambda: None
        """Called before what lies behind the slots' addresses changes: nothing may read it through other mappings."""
        self._watcher = ReportedThread(target=self._watch, name="moe-offload-daemon-watch", daemon=True)
        self._watcher.start()

    @property
    def daemon_pid(self) -> int:
        """Of the daemon that keeps the slots; 0 while there is none."""
        return 0 if self._attachment is None else self._attachment.connection.daemon_pid

    def begin_step(self) -> bool:
        """Nothing is held: the moment to join a daemon that has come back. Returns whether ``pools`` have changed."""
        assert self.state is not CLOSED
        before = self.pools
        if self.state is REJOINING:
            self._rejoin()
        elif self.lease_lost:
            self.fail_over(PoolGoneError("the daemon has detached this worker"))
            self._restore_lease()
        return self.pools is not before

    @property
    def lease_lost(self) -> bool:
        """Whether experts may have left the slots that layers compute on without looking, since the step began."""
        return self.lease and self._attachment is not None and not all(pool.is_attached for pool in self._attached)

    def fail_over(self, reason: OffloadError) -> None:
        """Go on without the daemon: slots become this process's own. Nothing may be held. Idempotent."""
        attachment = self._attachment
        if attachment is None:
            return
        with self._changing:
            self._attachment = None
            if self.state is CONNECTED:
                self._enter(ALONE)
        self._trusted = attachment.stays_true(_DYING_SECONDS)
        kept = self._serve_alone(attachment.tables)
        attachment.close()
        if not self._trusted:
            self._retry_at = time.monotonic() + BACKOFF_SECONDS
        logger.warning("%s; going on without it, with %d experts that were loaded", reason, kept)

    def close(self) -> None:
        """Leave the daemon. Idempotent."""
        if self.state is CLOSED:
            return
        self._closing.set()
        self._watcher.join()
        self._close_pools()
        self._close(self._attachment, self._successor)
        with self._changing:
            self._attachment = self._successor = None
            self._enter(CLOSED)
        self._close_arenas()

    def _enter(self, state: ClientState) -> None:
        """Change the state. Under the lock, with ``_attachment`` and ``_successor`` as they belong to it."""
        assert state in TRANSITIONS[self.state], f"{self.state.value} -> {state.value}"
        self.state = state
        self.check_integrity()

    def check_integrity(self) -> None:
        """Assert what follows from the state."""
        assert (self._successor is not None) == (self.state is REJOINING)
        assert self._attachment is not None or self.state is not CONNECTED
        assert self._attachment is None or self.state in (CONNECTED, REJOINING)

    def _attach(self) -> Attachment:
        return Attachment.open(self.path, self._request, self._members, self._closing)

    def _serve_alone(self, tables: list[ResidencyTable]) -> int:
        """Serve from what the slots hold now, as far as ``tables`` are trusted. Returns how many experts that is."""
        operations = Operations(lambda: RecordLoader(self._store, cpus=self._io_cpus))
        self._close_pools()
        self.before_exchange()
        kept = 0
        pools = []
        for members, arena, table in zip(self._members, self._arenas, tables, strict=True):
            cache = self._own_cache(members, table.limit)
            if self._trusted:
                experts = np.flatnonzero(table.slot_of != ABSENT)
                cache.insert_resident(experts, table.slot_of[experts])
                kept += len(experts)
            arena.mapping.become_private()
            pools.append(LocalPool(members, arena, cache, operations))
        self.pools = self._by_layer(pools)
        return kept

    def _restore_lease(self) -> None:
        """Layers that compute without looking need every expert where the daemon had promised it."""
        if self.lease and not self._trusted:
            for pool in set(self.pools.values()):
                self._stats.add(pool.load_all())

    def _by_layer(self, pools: Sequence[HostPool]) -> dict[str, HostPool]:
        by_layout = {members.layout: pool for members, pool in zip(self._members, pools, strict=True)}
        return {entry.name: by_layout[entry.layout] for entry in self._store.layers}

    def _close_pools(self) -> None:
        """No read copies into slots any more: their memory may be exchanged."""
        for pool in set(self.pools.values()):
            pool.close()

    def _own_cache(self, members: PoolMembers, limit: int) -> ExpertCache:
        policy = create_policy(self._policy, members.layer_of)
        cache = ExpertCache(members.layer_of, members.experts, policy, at_home=True)
        cache.limit = max(limit, *members.counts)  # the step under way was cut up to fit an earlier limit
        return cache

    def _rejoin(self) -> None:
        """Serve from the memory of another daemon, if it still keeps it for this worker. Nothing may be held."""
        successor, last = self._successor, self._attachment
        assert successor is not None
        try:
            attached = successor.pools(self._arenas, self._stats)
        except OffloadError as error:
            successor.close()
            self._back_off(error)
            self._end_rejoining(last)
            return
        try:
            self._close_pools()
            self.before_exchange()
            for arena in self._arenas:
                arena.mapping.replace(successor.take_arena())
        except OffloadError as error:
            self._trusted = False
            self._serve_alone(successor.tables)
            self._restore_lease()
            self._close(successor, last)
            self._back_off(error)
            self._end_rejoining(None)
            return
        self._close(last)
        self._tables, self._trusted = successor.tables, True
        self._attached, self.pools = attached, self._by_layer(attached)
        self._end_rejoining(successor)
        logger.info("attached to the daemon at %s again", self.path)

    def _end_rejoining(self, attachment: Attachment | None) -> None:
        """The slots are memory of ``attachment``, or this process's own."""
        with self._changing:
            self._attachment, self._successor = attachment, None
            self._enter(ALONE if attachment is None else CONNECTED)

    def _watch(self) -> None:
        """Look for a daemon whenever there is none. Runs in a thread of its own."""
        while not self._closing.wait(RETRY_SECONDS):
            try:
                self._look_for_a_daemon()
            except DaemonGoneError:
                continue
            except Exception as error:  # whatever it is, this engine can serve without and ask again later
                self._back_off(error)

    def _look_for_a_daemon(self) -> None:
        last = self._attachment
        if self.state is REJOINING or time.monotonic() < self._retry_at:
            return
        if last is None or last.death.known():
            successor = self._attach_again()
            with self._changing:
                self._successor = successor
                self._enter(REJOINING)

    def _back_off(self, error: Exception) -> None:
        """The daemon that is there does not serve this engine: ask again later."""
        self._retry_at = time.monotonic() + BACKOFF_SECONDS
        reason = str(error) if isinstance(error, OffloadError) else f"{type(error).__name__}: {error}"
        if self._last_reason != reason:
            self._last_reason = reason
            logger.warning("a daemon is back, but this engine goes on without it: %s", reason)

    def _attach_again(self) -> Attachment:
        attachment = self._attach()
        try:
            if self.lease and not attachment.lease:
                raise RefusedError("it has no room for every expert, which this engine relies on")
            self._offer_what_is_here(attachment)
        except BaseException:
            attachment.close()
            raise
        return attachment

    def _offer_what_is_here(self, attachment: Attachment) -> None:
        """Spare the new daemon reading what the last one had read."""
        if not self._trusted:
            return
        for number, (arena, table) in enumerate(zip(self._arenas, self._tables, strict=True)):
            experts = np.flatnonzero(table.slot_of != ABSENT)
            if len(experts):
                message = ImportSlots(number, pack_ids(experts), pack_ids(table.slot_of[experts]))
                attachment.connection.request(message, [arena.mapping.fd])

    def _close(self, *attachments: Attachment | None) -> None:
        for attachment in attachments:
            if attachment is not None:
                attachment.close()

    def _close_arenas(self) -> None:
        for arena in self._arenas:
            arena.mapping.close()
