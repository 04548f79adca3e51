"""What each function does to the states of slots: the table in ``daemon/reclaim.py``, while workers do anything."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.daemon.fuzzing import Fuzzer
from tests.daemon.pools import N, Pool, Worker
from vllm_moe_offload.daemon.reclaim import SlotState
from vllm_moe_offload.daemon.relocate import lease
from vllm_moe_offload.pool import loader

FREE, DIRTY, LOADING = SlotState.FREE, SlotState.DIRTY, SlotState.LOADING
PUBLISHED, RETIRED, UNPUBLISHED = SlotState.PUBLISHED, SlotState.RETIRED, SlotState.UNPUBLISHED

TAKEN = {(FREE, UNPUBLISHED), (DIRTY, UNPUBLISHED)}
"""Given to an expert whose load begins before the lock is let go."""
ALLOWED = {
    "cache.acquire": TAKEN,
    "cache.admit": TAKEN,
    "cache.stream": TAKEN,
    "cache.move": {*TAKEN, (UNPUBLISHED, FREE), (UNPUBLISHED, DIRTY)},
    "in_flight.begin": {(UNPUBLISHED, LOADING)},
    "in_flight._end": {(LOADING, UNPUBLISHED)},
    "cache.forget": {(UNPUBLISHED, FREE), (UNPUBLISHED, DIRTY)},
    "cache.cancel": {(UNPUBLISHED, FREE), (UNPUBLISHED, DIRTY)},
    "reclaimer.publish": {(UNPUBLISHED, PUBLISHED), (RETIRED, PUBLISHED)},
    "reclaimer.retire": {(PUBLISHED, RETIRED)},
    "reclaimer.reclaim": {(RETIRED, UNPUBLISHED)},
    "reclaimer.mark_dirty": {(FREE, DIRTY)},
    "reclaimer._punch": {(DIRTY, FREE)},
}


class Observer:
    """Compares the states of all slots before and after every call of the functions that change some."""

    def __init__(self, it: Pool, patch: pytest.MonkeyPatch):
        self.pool = it.pool
        self.seen: set[tuple[str, SlotState, SlotState]] = set()
        self.wrong: list[str] = []
        for name in ALLOWED:
            part, function = name.split(".")
            patch.setattr(getattr(self.pool, part), function, self._observed(name, getattr(self._part(part), function)))

    def _part(self, name: str) -> Any:
        return getattr(self.pool, name)

    def _observed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def observed(*arguments: Any, **options: Any) -> Any:
            assert self.pool.lock.locked()
            before = self._states()
            try:
                return function(*arguments, **options)
            finally:
                self._compare(name, before, self._states())

        return observed

    def _states(self) -> list[SlotState]:
        return [self.pool.reclaimer.state_of(slot, self.pool.in_flight.loads) for slot in range(N)]

    def _compare(self, name: str, before: list[SlotState], after: list[SlotState]) -> None:
        changes = {(old, new) for old, new in zip(before, after, strict=True) if old is not new}
        self.seen |= {(name, *change) for change in changes}
        self.wrong += [f"{name}: {old.value} -> {new.value}" for old, new in changes - ALLOWED[name]]


@pytest.mark.parametrize("unreadable", [0.0, 0.1])
def test_whatever_workers_do_slots_change_as_the_table_says(
    tmp_path: Path, unreadable: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, read = np.random.default_rng(3), os.preadv

    def preadv(fd: int, buffers: list, offset: int) -> int:
        if broken.random() < unreadable:
            raise OSError(5, "EIO")
        return read(fd, buffers, offset)

    with Pool(tmp_path, limit=12) as it, monkeypatch.context() as patch:
        patch.setattr(loader.os, "preadv", preadv)
        observer = Observer(it, patch)
        workers = [Fuzzer(it, entry, seed=5, steps=120) for entry in range(3)]
        draw = np.random.default_rng(5)
        while any(worker.thread.is_alive() for worker in workers):
            it.pool.run_maintenance()
            it.pool.limit = int(draw.choice([1, 6, 12, 20, N]))
            for worker in workers:
                worker.thread.join(0.002)
        assert [worker.failure for worker in workers] == [None] * 3
        assert not observer.wrong
        happened = {(old, new) for _, old, new in observer.seen}
        assert happened >= {
            (FREE, UNPUBLISHED), (UNPUBLISHED, LOADING), (LOADING, UNPUBLISHED), (UNPUBLISHED, PUBLISHED),
            (PUBLISHED, RETIRED), (RETIRED, UNPUBLISHED), (FREE, DIRTY), (DIRTY, FREE),
        }  # fmt: skip


def test_a_lease_moves_experts_only_where_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(tmp_path, limit=6) as it, monkeypatch.context() as patch:
        worker, leasing = Worker(it, 0), Worker(it, 1)
        for layer in (3, 0, 2, 1):
            worker.use([layer * 8 + expert for expert in (1, 7, 2, 5)])
        it.pool.limit = N
        observer = Observer(it, patch)
        assert lease(it.pool, leasing.entry)
        assert not observer.wrong
        assert {name for name, _, _ in observer.seen} >= {"cache.move", "reclaimer.retire", "reclaimer.reclaim"}
        it.pool.check_integrity()


def test_the_states_of_one_slot(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=8) as it:
        worker, pool = Worker(it, 0), it.pool
        reclaimer, only = pool.reclaimer, np.array([5])

        def state() -> SlotState:
            return reclaimer.state_of(5, pool.in_flight.loads)

        assert state() is FREE
        worker.demand([5])
        assert state() is PUBLISHED, "an expert goes to the slot of its own number"
        worker.done()
        worker.reader.enter()
        with pool.lock:
            reclaimer.retire(only)
            reclaimer.reclaim()
            assert state() is RETIRED, "the worker has not left"
            reclaimer.republish(only, pool.in_flight.loads)
            assert state() is PUBLISHED
            reclaimer.retire(only)
        worker.reader.leave()
        with pool.lock:
            reclaimer.reclaim()
            assert state() is UNPUBLISHED
            pool.placement.release_done()
            pool.cache.forget(only)
            reclaimer.mark_dirty(only)
            assert state() is DIRTY
        it.run_maintenance()
        assert state() is FREE
        pool.check_integrity()


def test_what_is_read_beyond_the_limit_is_not_published(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=8) as it:
        first, second = Worker(it, 0), Worker(it, 1)
        held = first.demand(list(range(8)))
        lent = second.demand([8, 9])
        states = [it.pool.reclaimer.state_of(slot, ()) for slot in [*held.tolist(), *lent.tolist()]]
        assert states[8:] == [UNPUBLISHED] * 2
        it.pool.check_integrity()
