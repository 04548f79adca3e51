"""What a pool's memory shows and gives back while workers read: counted per reader, not per slot."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.daemon.pools import EXPERTS, N, Pool, Worker
from vllm_moe_offload.daemon.relocate import lease
from vllm_moe_offload.ipc.table import ABSENT
from vllm_moe_offload.pool import loader


def test_a_slot_hidden_twice_is_exposed_until_both_readers_have_left(tmp_path: Path) -> None:
    with Pool(tmp_path) as it:
        first, second = Worker(it, 0), Worker(it, 1)
        first.use([0])
        slot, reclaimer, exposed = int(it.pool.table.slot_of[0]), it.pool.reclaimer, it.pool.cache.exposed
        only = np.array([0])
        with it.pool.lock:
            for reader in (first.reader, second.reader):
                reader.enter()
                reclaimer.retire(only)
                reclaimer.republish(only, ())
            reclaimer.retire(only)
            second.reader.leave()
            reclaimer.reclaim()
            assert exposed[slot], "the first reader is inside"
            second.reader.enter()
            first.reader.leave()
            reclaimer.reclaim()
            assert not exposed[slot], "who entered after it was hidden cannot have found it"
            reclaimer.republish(only, ())
            reclaimer.retire(only)
            reclaimer.reclaim()
            assert exposed[slot], "the second has been inside since it was shown"
            reclaimer.republish(only, ())
            second.reader.leave()
            reclaimer.reclaim()
            assert exposed[slot], "it is shown"
        it.pool.check_integrity()


def test_a_slot_between_two_readers_stays_exposed_when_the_earlier_one_leaves(tmp_path: Path) -> None:
    with Pool(tmp_path) as it:
        earlier, later = Worker(it, 0), Worker(it, 1)
        earlier.use([0])
        slot, reclaimer = int(it.pool.table.slot_of[0]), it.pool.reclaimer
        only = np.array([0])
        with it.pool.lock:
            earlier.reader.enter()
            reclaimer.retire(only)
            reclaimer.republish(only, ())
            later.reader.enter()
            reclaimer.retire(only)
            earlier.reader.leave()
            reclaimer.reclaim()
            assert it.pool.cache.exposed[slot], "the later one found it shown again"
            later.reader.leave()
            reclaimer.reclaim()
            assert not it.pool.cache.exposed[slot]


def test_nothing_is_moved_for_a_lease_while_it_is_read_and_others_are_served_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pool(tmp_path, limit=6) as it:
        worker, reading, leasing = (Worker(it, entry) for entry in range(3))
        for layer in (3, 0, 2, 1):
            worker.use([layer * EXPERTS + e for e in (1, 7, 2, 5)])
        it.pool.limit = N
        it.run_maintenance()
        slots = it.pool.table.slot_of.copy()
        astray = np.flatnonzero((slots != ABSENT) & (slots != np.arange(N))).tolist()
        assert astray
        reading.reader.enter()
        ended = threading.Event()

        def ask() -> None:
            while not ended.wait(0.001):
                for first in range(0, N, EXPERTS):
                    worker.use(list(range(first, first + EXPERTS)))

        asking = threading.Thread(target=ask)
        asking.start()
        with monkeypatch.context() as patch:
            patch.setattr("vllm_moe_offload.daemon.relocate.PATIENCE_SECONDS", 0.05)
            assert not lease(it.pool, leasing.entry)
        reading.check(astray, slots[astray])
        reading.reader.leave()
        granted = lease(it.pool, leasing.entry)
        ended.set()
        asking.join(60)
        assert not asking.is_alive() and granted
        leasing.check(list(range(N)), np.arange(N))
        it.run_maintenance()
        it.pool.check_integrity()


def test_what_a_lease_has_not_read_yet_is_not_shown_to_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, reading, go_on = os.preadv, threading.Event(), threading.Event()

    def slow_disk(fd: int, buffers: list, offset: int) -> int:
        reading.set()
        assert go_on.wait(60)
        return read(fd, buffers, offset)

    with Pool(tmp_path) as it:
        worker, leasing = Worker(it, 0), Worker(it, 1)
        worker.use([3, 4])
        monkeypatch.setattr(loader.os, "preadv", slow_disk)
        thread = threading.Thread(target=lease, args=(it.pool, leasing.entry))
        thread.start()
        try:
            assert reading.wait(60)
            assert np.flatnonzero(it.pool.table.slot_of != ABSENT).tolist() == [3, 4]
            it.pool.check_integrity()
        finally:
            go_on.set()
            thread.join(60)
        leasing.check(list(range(N)), np.arange(N))
