"""A worker that is attached to a model: what it was promised, what it holds, and what it asks for.

Whatever comes from it is checked before it is trusted.
"""

import os
from collections.abc import Callable, Iterable, Sequence

from ..ipc.protocol import (
    Attach,
    Attached,
    Demand,
    FailedLoad,
    Hint,
    ImportSlots,
    PoolInfo,
    SlotsImported,
    Supplied,
    pack_ids,
    unpack_ids,
)
from ..pool.loader import DamagedRecordError
from ..store.reader import Store
from .import_slots import import_slots
from .pool import DaemonPool
from .relocate import lease


class Worker:
    """One rank of an engine, attached to one model. ``DaemonModel.attach`` makes it.

    It is *attached* until ``detach`` (it left, it died, or it broke the protocol: its session ends, however) or
    ``outlive`` (the daemon ends first). What it has, and who frees it:

    ======================  =============================  ============================================================
    what                    taken by                       freed by
    ======================  =============================  ============================================================
    its entry in the        ``DaemonModel.attach``         ``detach``: cleared at once, given to another worker as late
    tables                                                 as possible (``Entries``)
    pins of its tickets     ``demand``                     the worker, which writes the ticket's number to its entry;
                                                           what is left then, ``detach``
    pins of its lease       ``take_lease``                 ``take_lease`` where it does not come about; else ``detach``
    memory it was promised  ``DaemonModels.attach``        ``detach``: the next division of the memory is without it
    arena and table         it maps them                   its process; the descriptors stay the model's
    its connection          the server                     its session, which calls ``detach``
    ======================  =============================  ============================================================

    After ``outlive`` nothing is freed: what it reads stays as it is for as long as the daemon lives.

    Called from the thread of its session only, but for ``outlive``; its fields may be read by any. A ``ValueError``
    from any method means that a message made no sense.

    Args:
        entry: its number in the tables of the model.
        request: what it said of itself.
        leased: whether the memory is there for the lease that it asked for.
        least_bytes: no less can serve it as it was configured: promised while it is attached.
        pools: of the model.
        store: the model's.
        fds: arena and table of every pool; they stay the model's.
        same_experts: the attached workers of its engine that compute with other slices of the same experts.
        leave: called once, to free what the model keeps for it.
    """

    def __init__(
        self,
        entry: int,
        request: Attach,
        leased: bool,
        least_bytes: int,
        pools: Sequence[DaemonPool],
        store: Store,
        fds: list[int],
        same_experts: Callable[[], Iterable["Worker"]],
        leave: Callable[["Worker"], None],
    ):
        self.entry = entry
        self.pid, self.group, self.rank = request.pid, request.group, request.rank
        self.leased = leased
        self.wanted_bytes, self.least_bytes = request.wanted_bytes, least_bytes
        self.fds = fds
        self._pools = pools
        self._store = store
        self._same_experts = same_experts
        self._leave = leave
        self._attached = True
        for pool in pools:
            pool.admit(entry)

    @property
    def reply(self) -> Attached:
        """The answer to its ``Attach``; ``fds`` are sent with it."""
        pools = [
            PoolInfo(pool.experts, pool.limit, pool.arena.mapping.size, pool.table.mapping.size) for pool in self._pools
        ]
        return Attached(self.entry, self.leased, pools)

    def take_lease(self) -> bool:
        """Bring every expert into the slot of its own number and pin it there. Blocks.

        Returns:
            Whether it has come about. Not if other workers did not stop reading; nothing is pinned then.

        Raises:
            LoadError: a record could not be read.
        """
        self.leased = all(lease(pool, self.entry) for pool in self._pools)
        if not self.leased:
            for pool in self._pools:
                pool.end_lease(self.entry)
        return self.leased

    def demand(self, request: Demand) -> Supplied:
        """Blocks while records are read.

        Raises:
            ValueError: it makes no sense.
        """
        pool = self._pool(request.pool)
        supply = pool.demand(self.entry, request.ticket, unpack_ids(request.experts), request.stream)
        failed = [
            FailedLoad(expert, str(error), isinstance(error, DamagedRecordError)) for expert, error in supply.failed
        ]
        return Supplied(request.ticket, pack_ids(supply.slots), supply.loaded, supply.joined, failed)

    def hint(self, request: Hint) -> None:
        """Returns without waiting for anything to be read. The engine's other ranks will need the same.

        Raises:
            ValueError: it makes no sense.
        """
        experts = unpack_ids(request.experts)
        self._pool(request.pool).hint(self.entry, experts, request.stream)
        for other in self._same_experts():
            other._pools[request.pool].hint(other.entry, experts, request.stream)

    def import_slots(self, request: ImportSlots, fd: int) -> SlotsImported:
        """Take over ``fd``, an older arena, and from it what is right and absent here.

        Raises:
            ValueError: it makes no sense.
        """
        try:
            pool = self._pool(request.pool)
            experts, slots = unpack_ids(request.experts), unpack_ids(request.slots)
        except ValueError:
            os.close(fd)
            raise
        return SlotsImported(import_slots(pool, self._store, fd, experts, slots))

    def outlive(self) -> None:
        """The daemon ends before the worker does: what it reads must stay for as long as there is a daemon."""
        self._attached = False

    def detach(self) -> None:
        """Free what is kept for it. Idempotent; does nothing after ``outlive``."""
        if self._attached:
            self._attached = False
            self._leave(self)

    def _pool(self, number: int) -> DaemonPool:
        if not 0 <= number < len(self._pools):
            raise ValueError(f"there is no pool {number}: the model has {len(self._pools)}")
        return self._pools[number]
