"""One model in the daemon: an open store, a pool per record layout, and the workers attached to it.

It stays as it is when its last worker leaves, until others need the memory. It must never open anything but the store
it was given.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence

from ..errors import OffloadError
from ..ipc.arena import slot_bytes
from ..ipc.protocol import MAX_WORKERS, Attach, ModelStatus, WorkerStatus
from ..pool.loader import RecordLoader
from ..stats import DAEMON_STATISTICS, MODEL_STATISTICS, WORKER_STATISTICS, Stats
from ..store.pools import pools_of
from ..store.reader import Store
from ..threads import ReportedThread
from .budget import PoolSize, bytes_for, slots_within
from .entries import Entries
from .pool import DaemonPool
from .workers import Worker

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
"""How often noted uses are collected when nobody asks for anything; the rings of workers hold far more."""
_BUSY_SECONDS = 0.001


class DaemonModel:
    """Thread-safe.

    Args:
        store: closed with the model.
        policy: name of the eviction policy.
        io_cpus: where reading threads may run; None leaves them where the daemon runs.

    Raises:
        ConfigError: the policy is unknown, or the system has no room for the arenas' addresses.
    """

    def __init__(self, store: Store, policy: str, io_cpus: set[int] | None):
        self.store = store
        self.name = store.path.name
        self.pressure = 0.0
        """Bytes per second that workers lately waited for; kept by whoever divides the memory."""
        self.budget = 0
        self.workers: dict[int, Worker] = {}
        """Attached, by entry."""
        self._entries = Entries()
        self._departed = Stats()
        """What workers that have left had counted."""
        self._lock = threading.Lock()
        self._maintenance_due = threading.Event()
        self._closing = False
        self._complaint = ""
        self._loader = RecordLoader(store, cpus=io_cpus)
        self.pools = [
            DaemonPool(self.name[:8], store, members.layout, self._loader, policy, 0, self._maintenance_due.set)
            for members in pools_of(store.layers)
        ]
        self.sizes = [PoolSize(pool.experts, pool.layout.payload_bytes, slot_bytes(pool.layout)) for pool in self.pools]
        self.fds = [fd for pool in self.pools for fd in (pool.arena.mapping.reader_descriptor(), pool.table.mapping.fd)]
        """Arena, only to be read, and table of every pool; the model's."""
        self._maintainer = ReportedThread(
            target=self._run_maintenance, name=f"moe-offload-{self.name[:8]}", daemon=True
        )
        self._maintainer.start()

    @property
    def full_bytes(self) -> int:
        """What all its experts take."""
        return sum(size.full_bytes for size in self.sizes)

    @property
    def held_bytes(self) -> int:
        """What it takes now, at most."""
        return sum(size.taken(pool.held) for size, pool in zip(self.sizes, self.pools, strict=True))

    @property
    def wanted_bytes(self) -> int:
        """What its workers were configured to use, at least 1 if there is any."""
        return max([max(1, worker.wanted_bytes) for worker in list(self.workers.values())], default=0)

    @property
    def promised(self) -> int:
        """Bytes that the attached workers rely on, leases apart."""
        return max([worker.least_bytes for worker in list(self.workers.values())], default=0)

    @property
    def leased(self) -> bool:
        return any(worker.leased for worker in list(self.workers.values()))

    @property
    def missed_bytes(self) -> int:
        """What workers have waited for since the model was opened."""
        return sum(pool.stats.missed_bytes for pool in self.pools)

    def least_bytes(self, wanted: int, least_slots: Sequence[int] = ()) -> int:
        """Less cannot serve a worker configured to use ``wanted``: a whole layer, or what it wanted if that is less.

        Args:
            least_slots: per pool, what a single token of the worker needs.

        Raises:
            OffloadError: it speaks of other pools.
        """
        least_slots = least_slots or [1] * len(self.pools)
        if len(least_slots) != len(self.pools) or not all(
            1 <= least <= pool.largest_layer for least, pool in zip(least_slots, self.pools, strict=True)
        ):
            raise OffloadError(f"least_slots {list(least_slots)} does not fit the {len(self.pools)} pools of the model")
        slots = slots_within(self.sizes, wanted)
        return bytes_for(
            self.sizes,
            [
                max(least, min(pool.largest_layer, count))
                for least, pool, count in zip(least_slots, self.pools, slots, strict=True)
            ],
        )

    def set_budget(self, nbytes: int) -> None:
        """So many bytes may be taken from now on; taking less goes on until ``held_bytes`` shows it."""
        self.budget = nbytes
        for pool, slots in zip(self.pools, slots_within(self.sizes, nbytes), strict=True):
            if pool.limit != slots:
                pool.limit = slots

    def attach(self, request: Attach, leased: bool, same_experts: Callable[[], Iterable[Worker]]) -> Worker:
        """Take up a worker. That the memory it is promised is there is up to the caller; see ``Worker``.

        Raises:
            OffloadError: there is no entry left, or it speaks of other pools.
        """
        least_bytes = self.least_bytes(request.wanted_bytes, request.least_slots)
        with self._lock:
            entry = self._entries.take(request.pid)
            if entry is None:
                raise OffloadError(f"{MAX_WORKERS} workers are attached to store {self.name}, as many as can be")
            worker = Worker(
                entry, request, leased, least_bytes, self.pools, self.store, self.fds, same_experts, self._free
            )
            self.workers[entry] = worker
        logger.info("worker %d (pid %d) is attached to store %s", entry, request.pid, self.name)
        self._maintenance_due.set()
        return worker

    def freeze(self) -> None:
        """The daemon ends: what workers have seen stays true, and may outlive it."""
        for pool in self.pools:
            pool.freeze()

    def is_alike(self, other: "DaemonModel") -> bool:
        """Whether experts have the same ids in both: tensor-parallel slices of one model."""
        shapes = [[(entry.name, entry.experts) for entry in model.store.layers] for model in (self, other)]
        whole = [model.store.identity.facts.get("expert_parallel", [0, 1])[1] == 1 for model in (self, other)]
        return shapes[0] == shapes[1] and all(whole) and len(self.pools) == len(other.pools)

    def status(self) -> ModelStatus:
        with self._lock:
            workers = dict(self.workers)
            of_workers = {entry: self._stats_of(entry) for entry in workers}
            by_workers = Stats().merge([self._departed, *of_workers.values()])
        limits = [pool.limit for pool in self.pools]
        resident = [pool.resident for pool in self.pools]
        by_daemon = Stats(
            experts=sum(pool.experts for pool in self.pools),
            expert_bytes=self.full_bytes,
            slots=sum(limits),
            slot_bytes=sum(size.record_bytes * count for size, count in zip(self.sizes, limits, strict=True)),
            resident_experts=sum(resident),
            resident_bytes=sum(size.record_bytes * count for size, count in zip(self.sizes, resident, strict=True)),
            attached_workers=len(workers),
        ).merge(pool.stats for pool in self.pools)
        return ModelStatus(
            store=self.name,
            model=self.store.identity.model,
            stats=by_workers.as_dict(MODEL_STATISTICS) | by_daemon.as_dict(DAEMON_STATISTICS),
            workers=[
                WorkerStatus(
                    entry, one.pid, one.group, one.rank, one.leased, of_workers[entry].as_dict(WORKER_STATISTICS)
                )
                for entry, one in workers.items()
            ],
        )

    def close(self) -> None:
        """Nobody is attached any more: give everything back. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._maintenance_due.set()
        self._maintainer.join()
        self._loader.close()
        self._entries.close()
        for fd in self.fds[::2]:
            os.close(fd)
        for pool in self.pools:
            pool.close()
        self.store.close()

    def _free(self, worker: Worker) -> None:
        """A worker is detached: what was kept for it is free."""
        with self._lock:
            assert self.workers[worker.entry] is worker
            self._departed.merge([self._stats_of(worker.entry)])
            for pool in self.pools:
                pool.dismiss(worker.entry)
            del self.workers[worker.entry]
            self._entries.give_back(worker.entry)
        logger.info("worker %d (pid %d) has left store %s", worker.entry, worker.pid, self.name)

    def _stats_of(self, entry: int) -> Stats:
        return Stats.from_words(self.pools[0].table.stats[entry].tolist())

    def _run_maintenance(self) -> None:
        """Reclaim slots of the pools as long as the model is open. Runs in a thread of its own."""
        while True:
            self._maintenance_due.clear()
            if self._closing:
                return
            self._maintenance_due.wait(
                _BUSY_SECONDS if self._maintain_pools() else _LOOK_SECONDS if self.workers else None
            )

    def _maintain_pools(self) -> bool:
        """Whether something is left to do soon. Whatever goes wrong, it is tried again: nobody else reclaims slots."""
        busy = False
        for pool in self.pools:
            try:
                busy |= pool.run_maintenance()
            except Exception as error:
                complaint = f"{type(error).__name__}: {error}"
                if complaint != self._complaint:
                    self._complaint = complaint
                    logger.error(
                        "slots of store %s could not be reclaimed; the daemon tries again: %s", self.name, complaint
                    )
        return busy
