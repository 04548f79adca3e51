"""One worker's life with the daemon: it attaches, goes on alone when that is gone, and comes back to the next one.

The kernels keep the addresses they were given once; what lies behind them changes. It must never believe the contents
of shared memory that a process which may be alive could still write.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..cache import ExpertCache, create_policy
from ..cache.cache import ABSENT
from ..errors import OffloadError
from ..observe import Counters
from ..prefetch.loader import RecordLoader
from ..slots.base import SlotPool
from ..slots.embedded import EmbeddedPool
from ..slots.operations import Operations
from ..store.layout import RecordLayout
from ..store.pools import PoolMembers, pools_of
from ..store.reader import Store
from ..threads import ReportedThread
from . import membarrier
from .arena import Arena
from .connection import DaemonGoneError, RefusedError
from .protocol import Adopt, Attach, pack_ids
from .surviving_pool import SurvivingPool
from .table import ResidencyTable
from .worker_attachment import WorkerAttachment

RETRY_SECONDS = 1.0
GRUDGE_SECONDS = 30.0
"""How long a daemon that lives but did not serve is left alone."""
_DYING_SECONDS = 2.0


class DaemonClient:
    """Keeps the pools of one worker.

    Args:
        path: of the daemon's socket.
        request: what to attach to.
        store: of the model; read from when the daemon is gone, and not closed here.
        policy: name of the eviction policy while there is no daemon.
        io_cpus: where loader threads may run then; None leaves them where the process runs.
        counters: the worker's.
        say: told in a sentence what an operator would want to know.

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
        counters: Counters,
        say: Callable[[str], None],
    ):
        membarrier.register()
        self.path, self._request, self._store = path, request, store
        self._policy, self._io_cpus, self._counters, self._say = policy, io_cpus, counters, say
        self._members = pools_of(store.layers)
        """Of the pools, as the protocol numbers them."""
        self._closing = threading.Event()
        attachment = self._attach()
        self._arenas: list[Arena] = []
        try:
            for members in self._members:
                self._arenas.append(Arena.attach(attachment.take_arena(), members.layout, members.experts))
            self._attached = attachment.pools(self._arenas, counters)
            """Pools of the daemon attached to last."""
        except BaseException:
            self._close_arenas()
            attachment.close()
            raise
        self._current: WorkerAttachment | None = attachment
        self._tables = attachment.tables
        """Of the daemon attached to last."""
        self.lease = attachment.lease
        """Whether every expert stays in the slot of its own number."""
        self._pools = [
            SurvivingPool(arena, pool, self.fail_over) for arena, pool in zip(self._arenas, self._attached, strict=True)
        ]
        self._trusted = True
        """Whether what the tables say of the arenas is true, or was when the daemon ended."""
        self._next: WorkerAttachment | None = None
        """A daemon that has come back, until the next step begins."""
        self._not_before = 0.0
        self._told = ""
        self._watcher = ReportedThread(target=self._watch, name="moe-offload-daemon-watch", daemon=True)
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
        elif self.lease_lost:
            self.fail_over(DaemonGoneError("the daemon has detached this worker"))
            self._restore_lease()

    @property
    def lease_lost(self) -> bool:
        """Whether experts may have left the slots that layers compute on without looking, since the step began."""
        return self.lease and self._current is not None and not all(pool.minded for pool in self._attached)

    def fail_over(self, reason: OffloadError) -> None:
        """Go on without the daemon: slots become this process's own. Nothing may be held."""
        attachment, self._current = self._current, None
        if attachment is None:
            return
        self._trusted = attachment.stays_true(_DYING_SECONDS)
        kept = self._serve_alone(attachment.tables)
        attachment.close()
        if not self._trusted:
            self._not_before = time.monotonic() + GRUDGE_SECONDS
        self._say(f"{reason}; going on without it, with {kept} experts that were loaded")

    def close(self) -> None:
        """Leave the daemon."""
        self._closing.set()
        self._watcher.join()
        for pool in self._pools:
            pool.close()
        for attachment in (self._current, self._next):
            if attachment is not None:
                attachment.close()
        self._current = self._next = None
        self._close_arenas()

    def _attach(self) -> WorkerAttachment:
        return WorkerAttachment.open(self.path, self._request, self._members, self._closing)

    def _serve_alone(self, tables: list[ResidencyTable]) -> int:
        """Serve from what the slots hold now, as far as ``tables`` are trusted. Returns how many experts that is."""
        operations = Operations(lambda: RecordLoader(self._store, cpus=self._io_cpus))
        kept = 0
        for members, arena, table, pool in zip(self._members, self._arenas, tables, self._pools, strict=True):
            cache = self._own_cache(members, table.limit)
            if self._trusted:
                experts = np.flatnonzero(table.slot_of != ABSENT)
                cache.adopt(experts, table.slot_of[experts])
                kept += len(experts)
            pool.keep(EmbeddedPool(members, arena, cache, operations))
        return kept

    def _restore_lease(self) -> None:
        """Layers that compute without looking need every expert where the daemon had promised it."""
        if self.lease and not self._trusted:
            for pool in self._pools:
                self._counters.add(pool.load_all())

    def _own_cache(self, members: PoolMembers, limit: int) -> ExpertCache:
        policy = create_policy(self._policy, members.layer_of)
        cache = ExpertCache(members.layer_of, members.experts, policy, at_home=True)
        cache.limit = max(limit, *members.counts)  # the step under way was cut up to fit an earlier limit
        return cache

    def _come_back(self, attachment: WorkerAttachment) -> None:
        """Serve from the memory of another daemon, if it still keeps it for this worker. Nothing may be held."""
        try:
            attached = attachment.pools(self._arenas, self._counters)
        except OffloadError as error:
            attachment.close()
            self._leave_alone(error)
            return
        try:
            for pool, behind in zip(self._pools, attached, strict=True):
                pool.share(attachment.take_arena(), behind)
        except OffloadError as error:
            self._trusted, gone, self._current = False, self._current, None
            self._serve_alone(attachment.tables)
            self._restore_lease()
            for each in (attachment, gone):
                if each is not None:
                    each.close()
            self._leave_alone(error)
            return
        if self._current is not None:
            self._current.close()
        self._current, self._tables, self._trusted = attachment, attachment.tables, True
        self._attached = attached
        self._say(f"attached to the daemon at {self.path} again")

    def _watch(self) -> None:
        """Look for a daemon whenever there is none. Runs in a thread of its own."""
        while not self._closing.wait(RETRY_SECONDS):
            try:
                self._look_for_a_daemon()
            except DaemonGoneError:
                continue
            except Exception as error:  # whatever it is, this engine can serve without and ask again later
                self._leave_alone(error)

    def _look_for_a_daemon(self) -> None:
        current = self._current
        if self._next is not None or time.monotonic() < self._not_before:
            return
        if current is None or current.death.known():
            self._next = self._attach_again()

    def _leave_alone(self, error: Exception) -> None:
        """The daemon that is there does not serve this engine: ask again later."""
        self._not_before = time.monotonic() + GRUDGE_SECONDS
        reason = str(error) if isinstance(error, OffloadError) else f"{type(error).__name__}: {error}"
        if self._told != reason:
            self._told = reason
            self._say(f"a daemon is back, but this engine goes on without it: {reason}")

    def _attach_again(self) -> WorkerAttachment:
        attachment = self._attach()
        try:
            if self.lease and not attachment.lease:
                raise RefusedError("it has no room for every expert, which this engine relies on")
            self._offer_what_is_here(attachment)
        except BaseException:
            attachment.close()
            raise
        return attachment

    def _offer_what_is_here(self, attachment: WorkerAttachment) -> None:
        """Spare the new daemon reading what the last one had read."""
        if not self._trusted:
            return
        for number, (arena, table) in enumerate(zip(self._arenas, self._tables, strict=True)):
            experts = np.flatnonzero(table.slot_of != ABSENT)
            if len(experts):
                message = Adopt(number, pack_ids(experts), pack_ids(table.slot_of[experts]))
                attachment.connection.request(message, [arena.mapping.fd])

    def _close_arenas(self) -> None:
        for arena in self._arenas:
            arena.mapping.close()
