"""No worker waits for another: not for one that is stopped, nor for one that has begun to load what both need."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.daemon.pools import EXPERTS, N, Pool, Worker
from tests.daemon.wire import wait_until
from tests.runtime.record_stores import ALIGNED, LAYOUTS
from vllm_moe_offload.daemon.import_slots import import_slots
from vllm_moe_offload.daemon.relocate import lease
from vllm_moe_offload.ipc.table import ABSENT

GUARD_SECONDS = 60.0


def answers(job: Callable[[], object]) -> None:
    """``job`` returns although nobody else does anything."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(GUARD_SECONDS)
    assert not thread.is_alive(), "it waits for somebody"
    if failures:
        raise failures[0]


def layer(number: int, experts: int = EXPERTS) -> list[int]:
    return [number * EXPERTS + expert for expert in range(experts)]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("stops", ["reading in place", "computing on what it demanded", "both"])
@pytest.mark.parametrize("limit", [8, 13, 30])
def test_a_stopped_worker_is_walked_around(tmp_path: Path, limit: int, stops: str, name: str) -> None:
    with Pool(tmp_path, limit=limit, layout=LAYOUTS[name]) as it:
        stopped, other, third = (Worker(it, entry) for entry in range(3))
        stopped.use(layer(0))
        slots = it.pool.table.slot_of[layer(0)].copy()
        if stops != "computing on what it demanded":
            stopped.reader.enter()
        if stops != "reading in place":
            stopped.demand(layer(0))

        def serve() -> None:
            for turn in range(12):
                for worker in (other, third):
                    worker.demand(layer(turn % 4), stream=turn % 3 == 2)
                it.pool.check_integrity()
                assert it.pool.cache.occupied <= limit + 2 * EXPERTS, "more than a demand of each beyond the limit"
                for worker in (other, third):
                    worker.done()
                it.pool.hint(1, np.array(layer((turn + 1) % 4), np.int32), stream=turn % 2 == 0)
                it.pool.run_maintenance()
                stopped.check(layer(0), slots)

        answers(serve)
        wait_until(lambda: not it.pool.in_flight.loads, "the last hint had been read")
        it.pool.run_maintenance()
        assert it.pool.held <= limit, "what was lent beyond the limit is given back while the worker is still stopped"
        stopped.check(layer(0), slots)
        stopped.reader.leave()
        stopped.done()
        it.run_maintenance()
        it.pool.check_integrity()
        for turn in range(4):
            other.use(layer(turn))
            it.run_maintenance()
            assert it.pool.held <= limit
        other.use(layer(3))
        assert not other.use(layer(3)), "what is loaded is found without asking again"


def test_what_was_read_while_others_were_in_the_way_is_found_by_everybody_afterwards(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=12) as it:
        stopped, other = Worker(it, 0), Worker(it, 1)
        stopped.use(layer(0))
        stopped.reader.enter()
        other.demand(layer(1))
        assert it.pool.cache.occupied > 12 and (it.pool.table.slot_of[layer(1)] == ABSENT).any()
        stopped.reader.leave()
        it.run_maintenance()
        shown = it.pool.table.slot_of[layer(1)]
        assert (shown != ABSENT).all()
        other.check(layer(1), shown)
        it.pool.check_integrity()


def test_many_stopped_workers_are_walked_around(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=10) as it:
        for entry in range(6):
            stopped = Worker(it, entry)
            answers(lambda stopped=stopped, entry=entry: stopped.demand(layer(entry % 4)))
            stopped.reader.enter()
        other = Worker(it, 6)
        for turn in range(8):
            answers(lambda turn=turn: other.demand(layer(turn % 4)))
            other.done()
        it.pool.check_integrity()
        for entry in range(7):
            it.pool.dismiss(entry)
        it.run_maintenance()
        it.pool.check_integrity()
        assert it.pool.held <= 10 and not it.pool.cache.pins.any()


def test_a_lease_is_not_granted_while_a_worker_is_stopped_and_nothing_stays_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pool(tmp_path, limit=6) as it:
        stopped, leasing = Worker(it, 0), Worker(it, 1)
        for number in (3, 0, 2, 1):
            stopped.use([number * EXPERTS + e for e in (1, 7, 2, 5)])
        astray = np.flatnonzero((it.pool.cache.slot_of != ABSENT) & (it.pool.cache.slot_of != np.arange(N)))
        stopped.demand(astray[:1].tolist())
        it.pool.limit = N
        with monkeypatch.context() as patch:
            patch.setattr("vllm_moe_offload.daemon.relocate.PATIENCE_SECONDS", 0.05)
            assert not lease(it.pool, 1)
        stopped.done()
        it.run_maintenance()
        assert not it.pool.cache.pins.any()
        assert lease(it.pool, 1)
        leasing.check(list(range(N)), np.arange(N))
        it.pool.check_integrity()


def test_who_demands_what_a_hint_of_another_has_begun_is_answered(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=8) as it:
        _, demanding, reading = (Worker(it, entry) for entry in range(3))
        reading.use(layer(0))
        reading.reader.enter()
        wanted = np.array(layer(1, 4), np.int32)
        hint = threading.Thread(target=it.pool.hint, args=(0, wanted, True))
        hint.start()
        wait_until(lambda: bool(it.pool.table.loading[wanted].any()) or not hint.is_alive(), "the hint was seen")
        demand = threading.Thread(target=demanding.demand, args=(layer(1, 2),), daemon=True)
        demand.start()
        wait_until(lambda: it.pool.stats.joined > 0 or not demand.is_alive(), "the two met")
        reading.reader.leave()
        demand.join(GUARD_SECONDS)
        assert not demand.is_alive(), "it waits for a load nobody has started"
        hint.join(GUARD_SECONDS)
        assert it.pool.hint(0, np.array([20, 21], np.int32)) >= 0
        wait_until(lambda: not it.pool.in_flight.loads, "hints are read as ever")
        demanding.done()
        it.pool.check_integrity()


@pytest.mark.parametrize("begins", ["hint", "stream", "demand", "lease"])
def test_what_a_worker_has_begun_is_read_by_whoever_needs_it_though_it_does_not_go_on(
    tmp_path: Path, begins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pool(tmp_path, layout=LAYOUTS["mixed"]) as it:
        first, second = Worker(it, 0), Worker(it, 1)
        goes_on, has_begun, join = threading.Event(), threading.Event(), it.loader.join

        def joined(loads) -> None:
            if threading.current_thread() is beginning:
                has_begun.set()
                assert goes_on.wait(GUARD_SECONDS)
            join(loads)

        def begin() -> None:
            if begins == "lease":
                lease(it.pool, 0)
            elif begins == "demand":
                first.demand(layer(2))
            else:
                it.pool.hint(0, np.array(layer(2), np.int32), stream=begins == "stream")
                has_begun.set()

        monkeypatch.setattr(it.loader, "join", joined)
        beginning = threading.Thread(target=begin)
        beginning.start()
        assert has_begun.wait(GUARD_SECONDS)
        answers(lambda: second.demand(layer(2)))
        second.done()
        goes_on.set()
        beginning.join(GUARD_SECONDS)
        assert not beginning.is_alive()
        wait_until(lambda: not it.pool.in_flight.loads, "everything was read")
        it.pool.check_integrity()


def test_what_an_import_has_begun_arrives_though_it_fails(tmp_path: Path) -> None:
    class Failing:
        """A store whose records cannot be looked at."""

        def record_digest(self, parts: object) -> bytes:
            raise RuntimeError("no digest")

    with Pool(tmp_path / "old") as old, Pool(tmp_path / "new") as new:
        Worker(old, 0).use(layer(0))
        experts = np.array(layer(0), np.int32)
        descriptor = old.pool.arena.mapping.reader_descriptor()
        with pytest.raises(RuntimeError, match="no digest"):
            import_slots(new.pool, Failing(), descriptor, experts, old.pool.table.slot_of[experts])  # type: ignore[arg-type]
        assert not new.pool.in_flight.loads
        other = Worker(new, 1)
        answers(lambda: other.demand(layer(0)))
        other.done()
        new.run_maintenance()
        new.pool.check_integrity()
        assert not new.pool.cache.pins.any()


@pytest.mark.parametrize("limit", [1, 4])
def test_a_demand_made_before_the_pool_shrank_is_served(tmp_path: Path, limit: int) -> None:
    with Pool(tmp_path, limit=16, layout=ALIGNED) as it:
        worker = Worker(it, 0)
        worker.use(layer(0))
        it.pool.limit = limit
        it.run_maintenance()
        for number in (1, 2, 1):
            worker.demand(layer(number))
            it.pool.check_integrity()
            worker.done()
            it.run_maintenance()
            assert it.pool.held <= limit
        with pytest.raises(ValueError, match="at most 8"):
            it.pool.demand(0, 99, np.arange(9, dtype=np.int32))


@pytest.mark.parametrize("where", ["in_flight.wait_for", "in_flight.begin", "reclaimer.republish", "loader.join"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_demand_that_fails_anywhere_pins_nothing(
    tmp_path: Path, where: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pool(tmp_path, limit=10) as it:
        worker, other = Worker(it, 0), Worker(it, 1)
        other.use(layer(0, 4))

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("anything")

        part, method = where.split(".")
        with monkeypatch.context() as patch:
            patch.setattr(getattr(it.pool, part), method, fail)
            with pytest.raises(RuntimeError, match="anything"):
                it.pool.demand(0, 1, np.array([0, 1, 8, 9, 10], np.int32), stream)
        wait_until(lambda: not it.pool.in_flight.loads, "what was begun had been read")
        it.pool.run_maintenance()
        assert not it.pool.cache.pins.any()
        it.pool.check_integrity()
        worker.ticket = 1
        answers(lambda: worker.demand([0, 1, 8, 9, 10]))
        worker.done()
        it.run_maintenance()
        it.pool.check_integrity()
        assert (it.pool.table.slot_of[[0, 1, 8, 9, 10]] != ABSENT).all()


@pytest.mark.parametrize("stream", [False, True])
def test_a_hint_that_fails_pins_nothing(tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(tmp_path, limit=20) as it:
        worker = Worker(it, 0)

        def fail(*_: object) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(it.pool.in_flight, "_load", fail)
            with pytest.raises(MemoryError):
                it.pool.hint(0, np.array([0, 1, 2], np.int32), stream)
        assert not it.pool.cache.pins.any()
        it.pool.check_integrity()
        worker.demand([0, 1, 2])
