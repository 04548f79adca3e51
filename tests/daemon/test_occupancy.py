"""What a pool's memory shows and gives back while workers read: counted per reader, not per slot."""

from pathlib import Path

import numpy as np

from tests.daemon.pools import EXPERTS, N, Pool, Worker
from vllm_moe_offload.daemon.lease import _everyone_is_home, _move_some, lease
from vllm_moe_offload.daemon.table import ABSENT


def test_a_slot_hidden_twice_is_exposed_until_both_readers_have_left(tmp_path: Path) -> None:
    with Pool(tmp_path) as it:
        first, second = Worker(it, 0), Worker(it, 1)
        first.use([0])
        slot, occupancy, exposed = int(it.pool.table.slot_of[0]), it.pool.occupancy, it.pool.cache.exposed
        only = np.array([0])
        with it.pool.lock:
            for reader in (first.reader, second.reader):
                reader.enter()
                occupancy.hide(only)
                occupancy.show_again(only, ())
            occupancy.hide(only)
            second.reader.leave()
            occupancy.reclaim()
            assert exposed[slot], "the first reader is inside"
            second.reader.enter()
            first.reader.leave()
            occupancy.reclaim()
            assert not exposed[slot], "who entered after it was hidden cannot have found it"
            occupancy.show_again(only, ())
            occupancy.hide(only)
            occupancy.reclaim()
            assert exposed[slot], "the second has been inside since it was shown"
            occupancy.show_again(only, ())
            second.reader.leave()
            occupancy.reclaim()
            assert exposed[slot], "it is shown"
        it.pool.check_integrity()


def test_a_slot_between_two_readers_stays_exposed_when_the_earlier_one_leaves(tmp_path: Path) -> None:
    with Pool(tmp_path) as it:
        earlier, later = Worker(it, 0), Worker(it, 1)
        earlier.use([0])
        slot, occupancy = int(it.pool.table.slot_of[0]), it.pool.occupancy
        only = np.array([0])
        with it.pool.lock:
            earlier.reader.enter()
            occupancy.hide(only)
            occupancy.show_again(only, ())
            later.reader.enter()
            occupancy.hide(only)
            earlier.reader.leave()
            occupancy.reclaim()
            assert it.pool.cache.exposed[slot], "the later one found it shown again"
            later.reader.leave()
            occupancy.reclaim()
            assert not it.pool.cache.exposed[slot]


def test_memory_an_expert_has_moved_from_is_given_back_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=6) as it:
        worker, reading, leasing = (Worker(it, entry) for entry in range(3))
        for layer in (3, 0, 2, 1):
            worker.use([layer * EXPERTS + e for e in (1, 7, 2, 5)])
        it.pool.limit = N
        it.tend()
        slots = it.pool.table.slot_of.copy()
        astray = np.flatnonzero((slots != ABSENT) & (slots != np.arange(N))).tolist()
        assert astray
        reading.reader.enter()
        with it.pool.lock:
            while not lease_step(it):
                pass
        for _ in range(3):
            it.pool.tend()
            reading.check(astray, slots[astray])
        reading.reader.leave()
        it.tend()
        it.pool.check_integrity()
        assert lease(it.pool, leasing.entry)


def lease_step(it: Pool) -> bool:
    """Whether nothing can be moved for a lease any more."""
    it.pool.placement.release_done()
    it.pool.occupancy.reclaim()
    return _everyone_is_home(it.pool) or not _move_some(it.pool)
