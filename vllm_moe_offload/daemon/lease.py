"""Every expert of a pool in the slot of its own number, for a worker whose kernels read the arena as it lies.

It must never move a record that a forward pass has been promised, nor leave one half-way between two slots.
"""

import time

import numpy as np

from ..cache.cache import FREE
from ..errors import LoadError
from .hosted_load import HostedLoad
from .hosted_pool import PATIENCE_SECONDS, HostedPool

_NAP_SECONDS = 0.0005
_MOVES = 4
"""Records moved at a time: demands of others wait meanwhile."""
_READS = 64


def lease(pool: HostedPool, worker: int) -> None:
    """Bring everything home and pin it until the worker is dismissed. Blocks; the pool's limit must allow it.

    Raises:
        LoadError: a record could not be read, or other workers did not stop reading in time.
    """
    own, joined = _pin_all(pool, worker)
    for first in range(0, len(own), _READS):
        pool.read(own[first : first + _READS], [])
    pool.read([], joined)
    failed = {load.slot: load.error for load in (*own, *joined) if load.error is not None}
    if failed:
        with pool.lock:
            pinned = pool.guests[worker].lease
            assert pinned is not None
            pool.guests[worker].lease = pinned[~np.isin(pinned, list(failed))]
        raise next(error for error in failed.values() if error is not None)


def _pin_all(pool: HostedPool, worker: int) -> tuple[list[HostedLoad], list[HostedLoad]]:
    """Returns the loads begun for the lease, and those that were under way."""
    everything = np.arange(pool.experts, dtype=np.int32)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with pool.lock:
            pool.release_done()
            if _everyone_is_home(pool):
                joined = list(pool.under_way.loads.values())
                acquired = pool.cache.acquire(everything, use=False)
                pool.guests[worker].lease = acquired.slots
                pool.occupancy.show_again(everything, pool.under_way.loads)
                return pool.under_way.begin(acquired), joined
            if _move_some(pool):
                deadline = time.monotonic() + PATIENCE_SECONDS
        time.sleep(_NAP_SECONDS)
    holding = [worker for worker, guest in pool.guests.items() if guest.holds] or pool.occupancy.holders()
    raise LoadError(f"workers {holding} have kept experts from being moved for {PATIENCE_SECONDS:.0f} s")


def _everyone_is_home(pool: HostedPool) -> bool:
    slots = np.flatnonzero(pool.cache.expert_of != FREE)
    return bool((pool.cache.expert_of[slots] == slots).all())


def _move_some(pool: HostedPool) -> bool:
    """Move a few experts whose own slots are free, or if none is, empty one slot. Returns whether anything changed."""
    cache, occupancy = pool.cache, pool.occupancy
    slots = np.flatnonzero((cache.expert_of != FREE) & (cache.pins == 0))
    astray = cache.expert_of[slots[cache.expert_of[slots] != slots]]
    if len(astray) == 0:
        return False
    homeless = cache.expert_of[astray] != FREE
    if homeless.all():
        _evict(pool, astray[:1])
        return True
    moved = 0
    for expert in astray[~homeless][:_MOVES].tolist():
        if occupancy.are_clear(np.array([expert])):
            _move(pool, expert)
            moved += 1
    return moved > 0


def _move(pool: HostedPool, expert: int) -> None:
    old, only = int(pool.cache.slot_of[expert]), np.array([expert])
    pool.occupancy.back(expert)
    for source, target in zip(pool.arena.slot(old), pool.arena.slot(expert), strict=True):
        target[:] = source
    pool.occupancy.hide(only)
    pool.cache.move(expert, expert)
    pool.occupancy.soil(np.array([old]))
    pool.occupancy.show(only)


def _evict(pool: HostedPool, experts: np.ndarray) -> None:
    slots = pool.cache.slot_of[experts]
    pool.occupancy.hide(experts)
    pool.under_way.note_evicted(experts)
    pool.cache.forget(experts)
    pool.occupancy.soil(slots)
