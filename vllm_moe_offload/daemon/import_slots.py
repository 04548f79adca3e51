"""Records taken over from the arena of an older daemon, which a worker that outlived it still had mapped.

It must never trust what that memory holds: a record counts if its checksum is the store's.
"""

import numpy as np
from numpy.typing import NDArray

from ..cache.cache import ABSENT
from ..errors import ConfigError
from ..ipc.arena import Arena
from ..store.reader import Store
from .loads import DaemonLoad
from .pool import DaemonPool

_AT_A_TIME = 8


def import_slots(pool: DaemonPool, store: Store, fd: int, experts: NDArray[np.int32], slots: NDArray[np.int32]) -> int:
    """Copy what is absent here and right there, as long as slots are free. Takes over ``fd``. Returns how many.

    Args:
        experts: flat ids, distinct.
        slots: where each is in the older arena.

    Raises:
        ValueError: the arena, the ids or the slots are not of this pool.
    """
    older = Arena.attach(fd, pool.layout, pool.experts)
    try:
        pool.check_ids(experts)
        if len(slots) != len(experts) or (len(slots) and (slots.min() < 0 or slots.max() >= pool.experts)):
            raise ValueError(f"{len(slots)} slots for {len(experts)} experts do not fit a pool of {pool.experts}")
        place = dict(zip(experts.tolist(), slots.tolist(), strict=True))
        imported = 0
        for first in range(0, len(experts), _AT_A_TIME):
            loads = _begin(pool, experts[first : first + _AT_A_TIME])
            try:
                for load in loads:
                    _copy(pool, store, older, place[load.flat], load)
            finally:  # others may be waiting for them by now
                rest = [load for load in loads if not load.copied]
                pool.loader.start(rest)
                pool.loader.join(rest)
            imported += len(loads) - len(rest)
        return imported
    finally:
        older.mapping.close()


def _begin(pool: DaemonPool, experts: NDArray[np.int32]) -> list[DaemonLoad]:
    with pool.lock:
        pool.placement.release_done()
        absent = experts[pool.cache.slot_of[experts] == ABSENT]
        room = max(0, pool.limit - pool.cache.occupied)
        return pool.in_flight.begin(pool.cache.admit(absent[:room]), pinned=True)


def _copy(pool: DaemonPool, store: Store, older: Arena, slot: int, load: DaemonLoad) -> None:
    """Take the record over if it is right; it has arrived then."""
    try:
        pool.arena.allocate(load.slot)
    except ConfigError:
        return
    targets = pool.arena.targets(load.slot)
    for source, target in zip(older.slot(slot), targets, strict=True):
        target[:] = source
    if store.record_digest(targets) == store.checksum(load.layer, load.expert):
        pool.arena.commit(load.slot)
        load.copied = True
        load.finish()
