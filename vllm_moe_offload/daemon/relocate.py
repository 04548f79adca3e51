"""Every expert of a pool in the slot of its own number, for a worker whose kernels read the arena as it lies.

It must never move a record that a forward pass has been promised, nor leave one half-way between two slots.
"""

import time

import numpy as np

from ..cache.base import IntArray
from ..cache.cache import FREE
from .loads import DaemonLoad
from .pool import DaemonPool

PATIENCE_SECONDS = 20.0
"""How long a lease waits while nothing can be moved."""
_NAP_SECONDS = 0.0005
_MOVES = 4
"""Records moved at a time: demands of others wait meanwhile."""
_READS = 64


def lease(pool: DaemonPool, worker: int) -> bool:
    """Move every expert to its own slot and pin it there. Blocks; the pool's limit must allow it.

    Returns:
        False if other workers did not stop reading in time; nothing is pinned then.

    Raises:
        LoadError: a record could not be read.
    """
    loads = _pin_all(pool, worker)
    if loads is None:
        return False
    for first in range(0, len(loads), _READS):
        pool.loader.join(loads[first : first + _READS])
    failed = {load.slot: load.error for load in loads if load.error is not None}
    if failed:
        with pool.lock:
            pinned = pool.pins[worker].lease
            assert pinned is not None
            pool.pins[worker].lease = pinned[~np.isin(pinned, list(failed))]
        raise next(error for error in failed.values() if error is not None)
    return True


def _pin_all(pool: DaemonPool, worker: int) -> list[DaemonLoad] | None:
    """Returns what is under way for the lease then, or None where it cannot be."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        while time.monotonic() < deadline:
            with pool.lock:
                pool.placement.release_done()
                if _all_in_place(pool):
                    return _acquire(pool, worker)
                if _move_some(pool):
                    deadline = time.monotonic() + PATIENCE_SECONDS
            time.sleep(_NAP_SECONDS)
        return None
    finally:
        with pool.lock:
            pool.reclaimer.withheld.clear()


def _acquire(pool: DaemonPool, worker: int) -> list[DaemonLoad]:
    everything = np.arange(pool.experts, dtype=np.int32)
    pool.reclaimer.withheld.clear()
    joined = list(pool.in_flight.loads.values())
    acquired = pool.cache.acquire(everything, use=False)
    pool.pins[worker].lease = acquired.slots
    begun = pool.begin(acquired)
    pool.reclaimer.republish(everything, pool.in_flight.loads)
    return [*joined, *begun]


def _all_in_place(pool: DaemonPool) -> bool:
    slots = np.flatnonzero(pool.cache.expert_of != FREE)
    return bool((pool.cache.expert_of[slots] == slots).all())


def _move_some(pool: DaemonPool) -> bool:
    """Move a few experts whose own slots are free, or if none is, empty one slot, where nobody is reading any more.

    Returns whether anything changed.
    """
    cache, reclaimer = pool.cache, pool.reclaimer
    slots = np.flatnonzero((cache.expert_of != FREE) & (cache.pins == 0))
    misplaced = cache.expert_of[slots[cache.expert_of[slots] != slots]]
    if len(misplaced) == 0:
        return False
    can_move = cache.expert_of[misplaced] == FREE
    chosen = misplaced[can_move][:_MOVES] if can_move.any() else misplaced[:1]
    reclaimer.withhold(chosen)
    unread = chosen[~cache.exposed[cache.slot_of[chosen]]]
    if not can_move.any():
        _evict(pool, unread)
    else:
        for expert in unread.tolist():
            _move(pool, expert)
    return len(unread) > 0


def _move(pool: DaemonPool, expert: int) -> None:
    old, only = int(pool.cache.slot_of[expert]), np.array([expert])
    pool.arena.allocate(expert)
    for source, target in zip(pool.arena.slot(old), pool.arena.slot(expert), strict=True):
        target[:] = source
    pool.cache.move(expert, expert)
    pool.reclaimer.mark_dirty(np.array([old]))
    pool.reclaimer.withheld.remove(expert)
    pool.reclaimer.publish(only)


def _evict(pool: DaemonPool, experts: IntArray) -> None:
    slots = pool.cache.slot_of[experts]
    pool.in_flight.note_evicted(experts)
    pool.cache.forget(experts)
    pool.reclaimer.mark_dirty(slots)
