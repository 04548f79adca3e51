"""A pool shared by workers: right records, never more than the limit, nothing read twice, nobody stuck."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.daemon.pools import EXPERTS, N, Pool, Worker
from tests.daemon.wire import wait_until
from tests.runtime.record_stores import LAYOUTS
from vllm_moe_offload.daemon import placement
from vllm_moe_offload.daemon.import_slots import import_slots
from vllm_moe_offload.daemon.relocate import lease
from vllm_moe_offload.ipc.table import ABSENT


def in_threads(*jobs) -> None:
    failures: list[BaseException] = []

    def guarded(job) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "stuck"
    if failures:
        raise failures[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_demanded_is_there_and_found_without_asking_afterwards(tmp_path: Path, name: str) -> None:
    with Pool(tmp_path, limit=20, layout=LAYOUTS[name]) as it:
        first, second = Worker(it, 0), Worker(it, 5)
        for layer in range(4):
            experts = [layer * EXPERTS + e for e in (1, 4, 6)]
            assert first.use(experts)
            assert not second.use(experts)
        it.pool.check_integrity()
        assert it.pool.stats.loads == 12 and it.pool.stats.demands == 4


@pytest.mark.parametrize("limit", [8, 11, 20])
@pytest.mark.parametrize("policy", ["lfu", "lru", "least-stale"])
def test_many_workers_at_once_never_see_a_wrong_record(tmp_path: Path, limit: int, policy: str) -> None:
    with Pool(tmp_path, limit=limit, policy=policy) as it:
        workers = [Worker(it, entry) for entry in range(4)]
        stop = threading.Event()

        def work(worker: Worker) -> None:
            draw = np.random.default_rng(worker.entry)
            for turn in range(300):
                layer = turn % 4
                experts = (layer * EXPERTS + draw.permutation(EXPERTS)[: draw.integers(1, 7)]).tolist()
                if turn % 7 == 3:
                    it.pool.hint(worker.entry, np.array(experts, np.int32), stream=turn % 2 == 1)
                elif turn % 5 == 2:
                    worker.demand(experts, stream=turn % 3 == 0)
                    worker.done()
                else:
                    worker.use(experts)

        def maintain() -> None:
            while not stop.is_set():
                it.pool.run_maintenance()
                it.pool.check_integrity()
                assert it.pool.cache.occupied <= limit + 4 * 6, "more than a demand of each beyond the limit"

        maintainer = threading.Thread(target=maintain)
        maintainer.start()
        try:
            in_threads(*(lambda worker=worker: work(worker) for worker in workers))
        finally:
            stop.set()
            maintainer.join()
        for entry in range(4):
            it.pool.dismiss(entry)
        wait_until(lambda: not it.pool.in_flight.loads, "the last guess had arrived")
        it.run_maintenance()
        it.pool.check_integrity()
        assert not it.pool.cache.pins.any()
        assert it.pool.held <= limit


def test_one_record_is_read_once_for_all_who_wait_for_it(tmp_path: Path) -> None:
    with Pool(tmp_path) as it:
        workers = [Worker(it, entry) for entry in range(6)]
        for turn in range(4):
            experts = list(range(turn * EXPERTS, turn * EXPERTS + EXPERTS))
            in_threads(*(lambda worker=worker, experts=experts: worker.demand(experts) for worker in workers))
        assert it.pool.stats.loads == N
        it.pool.check_integrity()


def test_what_a_worker_computes_on_stays_until_it_is_done(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=8) as it:
        holder, other = Worker(it, 0), Worker(it, 1)
        experts = [0, 1, 2, 3]
        held = holder.demand(experts)
        for layer in (1, 2, 3):
            other.use([layer * EXPERTS + e for e in range(4)])
            holder.check(experts, held)
        holder.done()
        other.use([8, 9, 10, 11, 12, 13, 14, 15])
        assert it.pool.table.slot_of[0] == ABSENT
        it.pool.check_integrity()


def test_a_slot_read_in_place_is_not_reused_before_its_reader_leaves(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=4) as it:
        reader, other = Worker(it, 0), Worker(it, 1)
        reader.use([0, 1, 2, 3])
        reader.reader.enter()
        slots = it.pool.table.slot_of[[0, 1, 2, 3]]
        assert (slots != ABSENT).all()
        for layer in (1, 2, 3):
            other.use([layer * EXPERTS + e for e in range(4)])
            it.pool.run_maintenance()
            it.pool.check_integrity()
            reader.check([0, 1, 2, 3], slots)
        reader.reader.leave()
        other.use([8, 9, 10, 11])
        it.run_maintenance()
        assert it.pool.held == 4


def test_demands_too_big_together_take_turns_in_the_order_they_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "PATIENCE_SECONDS", 60.0)
    with Pool(tmp_path, limit=6) as it:
        first, second, third = (Worker(it, entry) for entry in range(3))
        order: list[int] = []
        first.demand([0, 1, 2, 3])

        def ask(worker: Worker, experts: list[int]) -> None:
            worker.demand(experts)
            order.append(worker.entry)
            worker.done()

        big = threading.Thread(target=ask, args=(second, [8, 9, 10, 11, 12]))
        big.start()
        while not it.pool.placement.queue:
            pass
        small = threading.Thread(target=ask, args=(third, [16, 17]))
        small.start()
        while len(it.pool.placement.queue) < 2:
            pass
        first.done()
        for thread in (big, small):
            thread.join(10)
            assert not thread.is_alive()
        assert order == [1, 2]


def test_a_worker_that_dies_while_computing_gives_everything_back(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=6) as it:
        dying, other = Worker(it, 0), Worker(it, 1)
        dying.demand([0, 1, 2, 3])
        dying.reader.enter()
        it.pool.dismiss(0)
        it.pool.dismiss(0)
        other.demand([8, 9, 10, 11, 12, 13])
        it.pool.check_integrity()
        assert it.pool.table.active[0] == 0


def test_nonsense_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=6) as it:
        worker = Worker(it, 0)
        worker.demand([0])
        for ticket, experts, why in (
            (2, [1, 1], "named twice"),
            (2, [N], f"not all among the {N}"),
            (2, [-1, 3], "experts -1 to 3"),
            (1, [3], "does not rise above 1"),
            (2, [0, 1, 2, 3, 4, 5, 6, 7, 8], "at most 8 of this pool"),
        ):
            with pytest.raises(ValueError, match=why):
                it.pool.demand(0, ticket, np.array(experts, np.int32))
        with pytest.raises(ValueError, match="named twice"):
            it.pool.hint(0, np.array([2, 2], np.int32))
        it.pool.check_integrity()
        assert it.pool.cache.occupied == 1


def test_a_failed_load_reaches_all_who_wait_and_its_slot_is_used_again(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=8) as it:
        it.built.flip(0, 2)
        workers = [Worker(it, entry) for entry in range(3)]
        supplies = []
        in_threads(
            *(
                lambda worker=worker: supplies.append(it.pool.demand(worker.entry, 1, np.array([1, 2, 3], np.int32)))
                for worker in workers
            )
        )
        for supply in supplies:
            assert [(expert, "checksum" in str(error)) for expert, error in supply.failed] == [(2, True)]
            assert (supply.slots == ABSENT).tolist() == [False, True, False]
            assert it.holds(supply.slots[0], 1) and it.holds(supply.slots[2], 3)
        assert it.pool.table.slot_of[2] == ABSENT and it.pool.table.loading[2] == 0
        it.pool.check_integrity()
        for worker in workers:
            worker.ticket = 1
            worker.done()
        it.built.flip(0, 2)
        workers[0].demand([2, 8, 9, 10, 11, 12, 13, 14])
        it.pool.check_integrity()


def test_a_hint_becomes_visible_without_anyone_asking_and_is_accounted_for(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=24) as it:
        worker = Worker(it, 0)
        assert it.pool.hint(0, np.array([9, 11, 13], np.int32)) == 3
        while (it.pool.table.slot_of[[9, 11, 13]] == ABSENT).any():
            pass
        assert not worker.use([9, 11])
        it.run_maintenance()
        assert it.pool.stats.prefetch_useful == 2 and it.pool.stats.prefetch_late == 0
        for layer in (0, 2, 3, 0, 2, 3):
            worker.use([layer * EXPERTS + e for e in range(EXPERTS)])
            it.run_maintenance()
        it.pool.check_integrity()
        assert it.pool.stats.prefetches == 3 and it.pool.stats.prefetch_wasted == 1


def test_hints_take_no_slot_from_what_is_pinned_nor_more_than_their_share(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=12) as it:
        worker = Worker(it, 0)
        held = worker.demand([0, 1, 2, 3])
        started = it.pool.hint(0, np.arange(8, 16, dtype=np.int32))
        assert started <= (12 - EXPERTS) // 2
        worker.check([0, 1, 2, 3], held)
        it.pool.check_integrity()


def test_a_long_prefill_leaves_most_of_the_pool_to_others(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=24) as it:
        decoding, prefilling = Worker(it, 0), Worker(it, 1)
        working_set = [[0, 1], [8, 9], [16, 17], [24, 25]]
        for experts in working_set * 3:
            decoding.use(experts)
        for layer in (0, 1, 2, 3, 0, 1, 2, 3):
            prefilling.demand(list(range(layer * EXPERTS, (layer + 1) * EXPERTS)), stream=True)
            prefilling.done()
            it.run_maintenance()
        assert sum(decoding.use(experts) for experts in working_set) == 0


def test_shrinking_empties_slots_and_gives_their_memory_back(tmp_path: Path) -> None:
    with Pool(tmp_path) as it:
        worker = Worker(it, 0)
        for layer in range(4):
            worker.use(list(range(layer * EXPERTS, (layer + 1) * EXPERTS)))
        full = arena_memory(it)
        held = worker.demand([0, 1, 2, 3])
        it.pool.limit = 10
        it.pool.run_maintenance()
        it.run_maintenance()
        assert it.pool.held == 10 and it.pool.cache.occupied == 10 and it.pool.table.limit == 10
        worker.check([0, 1, 2, 3], held)
        assert arena_memory(it) == full * 10 // N
        worker.done()
        for layer in range(4):
            worker.use(list(range(layer * EXPERTS, (layer + 1) * EXPERTS)))
        it.pool.check_integrity()
        assert arena_memory(it) == full * 10 // N
        it.pool.limit = N
        for layer in range(4):
            worker.use(list(range(layer * EXPERTS, (layer + 1) * EXPERTS)))
        assert it.pool.cache.occupied == N


def arena_memory(it: Pool) -> int:
    return os.fstat(it.pool.arena.mapping.fd).st_blocks * 512


def test_shrinking_waits_for_who_reads_in_place(tmp_path: Path) -> None:
    with Pool(tmp_path) as it:
        worker = Worker(it, 0)
        worker.use([0, 1, 2, 3])
        worker.reader.enter()
        slots = it.pool.table.slot_of[[0, 1, 2, 3]]
        it.pool.limit = 1
        assert it.pool.run_maintenance() and it.pool.run_maintenance()
        worker.check([0, 1, 2, 3], slots)
        assert it.pool.held == 4
        worker.reader.leave()
        it.run_maintenance()
        assert it.pool.held == 1


def test_the_reserve_costs_no_reading(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=24) as it:
        worker = Worker(it, 0)
        kept = [list(range(layer * EXPERTS, layer * EXPERTS + 6)) for layer in range(4)]
        for experts in kept:
            worker.use(experts)
        loads = it.pool.stats.loads
        it.run_maintenance()
        assert it.pool.cache.retired
        for experts in kept:
            worker.use(experts)
        assert it.pool.stats.loads == loads
        it.pool.check_integrity()


@pytest.mark.parametrize("held", [False, True])
def test_a_lease_brings_everything_home(tmp_path: Path, held: bool) -> None:
    with Pool(tmp_path, limit=6) as it:
        worker = Worker(it, 0)
        for layer in (3, 0, 2, 1):
            worker.use([layer * EXPERTS + e for e in (1, 7, 2, 5)])
        it.pool.limit = N
        for layer in (1, 2):
            worker.use([layer * EXPERTS + e for e in range(EXPERTS)])
        assert it.pool.cache.slot_of.tolist() != list(range(N))
        leasing = Worker(it, 1)
        if held:
            slots = worker.demand([8, 9, 10])
            thread = threading.Thread(target=lease, args=(it.pool, 1))
            thread.start()
            worker.check([8, 9, 10], slots)
            worker.done()
            thread.join(10)
        else:
            lease(it.pool, 1)
        assert it.pool.table.slot_of.tolist() == list(range(N))
        leasing.check(list(range(N)), np.arange(N))
        it.run_maintenance()
        it.pool.check_integrity()
        it.pool.limit = 4
        it.pool.run_maintenance()
        assert it.pool.table.slot_of.tolist() == list(range(N))
        it.pool.dismiss(1)
        it.run_maintenance()
        assert it.pool.cache.occupied == 4


def test_records_of_an_older_arena_are_taken_over_if_they_are_right(tmp_path: Path) -> None:
    with Pool(tmp_path / "old") as old, Pool(tmp_path / "new", limit=10) as new:
        worker = Worker(old, 0)
        worker.use([0, 1, 2, 3])
        worker.use([8, 9, 10])
        experts = np.array([0, 1, 2, 3, 8, 9, 10, 20], np.int32)
        old.pool.arena.slot(int(old.pool.table.slot_of[9]))[0][7] ^= 1
        other = Worker(new, 0)
        other.use([1])
        slots = np.where(old.pool.table.slot_of[experts] == ABSENT, 5, old.pool.table.slot_of[experts])
        assert import_slots(new.pool, new.built.store, old.pool.arena.mapping.reader_descriptor(), experts, slots) == 5
        for expert in experts.tolist():
            assert new.holds(int(new.pool.table.slot_of[expert]), expert)
        assert new.pool.stats.imported == 5 and new.pool.stats.loads == 3
        new.pool.check_integrity()
        with pytest.raises(ValueError):
            import_slots(new.pool, new.built.store, old.pool.table.mapping.reader_descriptor(), experts, slots)
        with pytest.raises(ValueError):
            import_slots(new.pool, new.built.store, old.pool.arena.mapping.reader_descriptor(), experts, slots + N)


def test_a_streaming_hint_takes_no_slots_that_are_being_read(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=8) as it:
        reading, prefilling = Worker(it, 0), Worker(it, 1)
        reading.use(list(range(EXPERTS)))
        reading.reader.enter()
        slots = it.pool.table.slot_of[:EXPERTS].copy()
        assert it.pool.hint(1, np.arange(8, 16, dtype=np.int32), stream=True) == 0
        reading.check(list(range(EXPERTS)), slots)
        it.pool.check_integrity()
        reading.reader.leave()
        prefilling.demand(list(range(8, 16)), stream=True)
        it.pool.check_integrity()


@pytest.mark.parametrize("seed", range(3))
def test_nothing_breaks_when_everything_happens_at_once(tmp_path: Path, seed: int) -> None:
    """Damaged records, limits that move, workers that come and go, guesses, prefills, leases."""
    with Pool(tmp_path) as it:
        for damaged in (3, 12, 27):
            it.built.flip(damaged // EXPERTS, damaged % EXPERTS)
        stop = threading.Event()

        def live(entry: int) -> None:
            draw = np.random.default_rng([seed, entry])
            for _ in range(6):
                worker = Worker(it, entry)
                for turn in range(40):
                    layer = int(draw.integers(4))
                    experts = layer * EXPERTS + draw.permutation(EXPERTS)[: draw.integers(1, 4)]
                    if turn % 3 == 0:
                        it.pool.hint(entry, experts.astype(np.int32), stream=turn % 2 == 0)
                        continue
                    worker.ticket += 1
                    supply = it.pool.demand(entry, worker.ticket, experts.astype(np.int32), stream=turn % 5 == 0)
                    assert {expert for expert, _ in supply.failed} == {3, 12, 27} & set(experts.tolist())
                    there = supply.slots != ABSENT
                    worker.check(experts[there].tolist(), supply.slots[there])
                    if turn % 4:
                        worker.done()
                it.pool.dismiss(entry)

        def disturb() -> None:
            draw = np.random.default_rng(seed)
            while not stop.is_set():
                it.pool.limit = int(draw.integers(12, N + 1))
                it.pool.run_maintenance()
                it.pool.check_integrity()

        disturber = threading.Thread(target=disturb)
        disturber.start()
        try:
            in_threads(*(lambda entry=entry: live(entry) for entry in range(4)))
        finally:
            stop.set()
            disturber.join()
        wait_until(lambda: not it.pool.in_flight.loads, "the last guess had arrived")
        it.run_maintenance()
        it.pool.check_integrity()
        assert not it.pool.cache.pins.any()
        assert it.pool.held <= it.pool.limit
        for damaged in (3, 12, 27):
            it.built.flip(damaged // EXPERTS, damaged % EXPERTS)
        it.pool.limit = N
        leasing = Worker(it, 9)
        lease(it.pool, 9)
        leasing.check(list(range(N)), np.arange(N))
        it.pool.check_integrity()
