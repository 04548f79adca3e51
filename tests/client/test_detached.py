"""A worker that lives but is not the daemon's any more: it computes on nothing that may have been overwritten."""

import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.daemon.pools import EXPERTS, Pool, Worker
from tests.daemon.processes import running_daemon
from tests.daemon.reading_worker import TOP_K, Reader
from tests.daemon.wire import wait_until
from tests.runtime.record_stores import ALIGNED, build_store
from vllm_moe_offload.client import attachment, client
from vllm_moe_offload.client.connection import DaemonGoneError, RefusedError
from vllm_moe_offload.client.remote_pool import RemotePool
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.ipc.protocol import Demand, Hint, Supplied, pack_ids, unpack_ids
from vllm_moe_offload.ipc.table import ABSENT
from vllm_moe_offload.load_report import NOTHING, LoadReport
from vllm_moe_offload.pool.base import PoolGoneError
from vllm_moe_offload.runtime import Batch
from vllm_moe_offload.stats import Stats

ENTRY = 3
LAYER = range(EXPERTS)
ASKED = np.array([0, 2, 5])


class Direct:
    """A connection to a pool in this process."""

    def __init__(self, it: Pool):
        self.it = it
        self.fails_with: OffloadError | None = None

    def send(self, hint: Hint) -> None:
        if self.fails_with is not None:
            raise self.fails_with
        self.it.pool.hint(ENTRY, unpack_ids(hint.experts), hint.stream)

    def request(self, demand: Demand) -> Supplied:
        if self.fails_with is not None:
            raise self.fails_with
        supply = self.it.pool.demand(ENTRY, demand.ticket, unpack_ids(demand.experts), demand.stream)
        return Supplied(demand.ticket, pack_ids(supply.slots), supply.loaded, supply.joined)


def attach(it: Pool) -> RemotePool:
    it.pool.admit(ENTRY)
    return RemotePool(Direct(it), 0, it.pool.arena, it.pool.table, ENTRY, itertools.count(1), Stats(), lease=False)  # type: ignore[arg-type]


def test_only_who_waits_for_a_daemon_learns_that_it_is_gone(tmp_path: Path) -> None:
    with Pool(tmp_path) as it:
        attached = attach(it)
        attached.enable_predictions()
        connection = attached._connection
        connection.fails_with = DaemonGoneError("it is gone")  # type: ignore[attr-defined]
        assert attached.stream_ahead(LAYER) == NOTHING
        assert attached.prefetch(LAYER, ASKED) == NOTHING
        assert attached.absent(LAYER)[ASKED].all() and not len(attached._speculative.unused), "they were not asked for"
        started, report = attached.start_hold(LAYER, ASKED)
        assert report == NOTHING
        for error in (DaemonGoneError("it is gone"), RefusedError("it will not")):
            connection.fails_with = error  # type: ignore[attr-defined]
            for ask in (
                lambda: attached.finish_hold(LAYER, started),
                lambda: attached.hold(LAYER, ASKED),
                lambda: attached.hold_streaming(LAYER, ASKED),
            ):
                with pytest.raises(PoolGoneError, match=str(error)):
                    ask()


def test_hints_that_get_through_are_counted(tmp_path: Path) -> None:
    with Pool(tmp_path) as it:
        attached = attach(it)
        assert attached.prefetch(LAYER, ASKED) == LoadReport(started=len(ASKED))
        assert attached.stream_ahead(range(EXPERTS, 2 * EXPERTS)) == LoadReport(streamed=EXPERTS)


def overwrite(it: Pool, entry: int) -> None:
    """Another worker uses every expert of the other layers, in the same entry if it is given the same."""
    other = Worker(it, entry)
    for layer in (1, 2, 3):
        other.use([layer * EXPERTS + expert for expert in range(EXPERTS)])
        it.run_maintenance()


@pytest.mark.parametrize("demanded", [True, False])
@pytest.mark.parametrize("successor", [ENTRY, ENTRY + 1])
def test_what_it_was_reading_is_void_and_the_entry_of_its_successor_is_not_touched(
    tmp_path: Path, demanded: bool, successor: int
) -> None:
    with Pool(tmp_path, limit=EXPERTS) as it:
        attached = attach(it)
        if not demanded:
            Worker(it, 0).use(ASKED.tolist())
        hold, _ = attached.hold(LAYER, ASKED)
        assert not hold.failures and bool(hold.ticket) == demanded  # type: ignore[attr-defined]
        it.pool.dismiss(ENTRY)
        overwrite(it, successor)
        assert not any(it.holds(slot, expert) for slot, expert in zip(hold.slots, ASKED, strict=True))
        entry = it.pool.table.entries[successor].copy()
        attached.release(hold)
        assert [failure.expert for failure in hold.failures] == ASKED.tolist()
        assert "took back its slots" in str(hold.failures[0].error)
        assert (it.pool.table.entries[successor] == entry).all()


def test_it_reads_nothing_more(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=EXPERTS) as it:
        attached = attach(it)
        attached.release(attached.hold(LAYER, ASKED)[0])
        it.pool.dismiss(ENTRY)
        with pytest.raises(PoolGoneError, match="detached"):
            RemotePool(Direct(it), 0, it.pool.arena, it.pool.table, ENTRY, itertools.count(1), Stats(), lease=False)  # type: ignore[arg-type]
        Worker(it, ENTRY).reader.enter()
        overwrite(it, ENTRY + 1)
        entry = it.pool.table.entries[ENTRY].copy()
        with pytest.raises(PoolGoneError, match="detached"):
            attached.hold(LAYER, ASKED)
        assert (it.pool.table.entries[ENTRY] == entry).all(), "its successor is reading"


def test_detached_at_the_moment_it_begins_to_read_it_reads_nothing_and_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pool(tmp_path, limit=EXPERTS) as it:
        attached = attach(it)
        attached.release(attached.hold(LAYER, ASKED)[0])
        enter = attached._reader.enter

        def detached_first() -> None:
            it.pool.dismiss(ENTRY)
            enter()

        monkeypatch.setattr(attached._reader, "enter", detached_first)
        with pytest.raises(PoolGoneError, match="detached"):
            attached.hold(LAYER, ASKED)
        overwrite(it, ENTRY + 1)
        it.run_maintenance()
        assert not it.pool.reclaimer.held_up(0.0) and it.pool.held <= EXPERTS


def test_a_daemon_that_does_not_answer_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(client, "_DYING_SECONDS", 0.1)
    made = build_store(tmp_path / "stores", [(ALIGNED, 12)] * 3)
    total = 3 * 12 * ALIGNED.payload_bytes
    with running_daemon(tmp_path / "daemon.sock", total // 2, made.store.path.parent) as daemon:
        reader = Reader(tmp_path / "daemon.sock", made.store.path, seed=1)
        reader.step()
        daemon.suspend()
        try:
            layer = next(iter(reader.runtime.layers.values()))
            absent = np.flatnonzero(layer.pool.absent(layer.span))[:TOP_K]
            assert len(absent) == TOP_K and (reader.client._tables[0].slot_of != ABSENT).any()
            reader.serve(layer, absent[None].astype(np.int32))
            assert reader.client.daemon_pid == 0 and "going on without it, with 0 experts" in reader.said[-1]
            for _ in range(5):
                reader.step()
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        reader.close()


def test_a_lease_that_is_lost_voids_the_step_and_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_DYING_SECONDS", 0.1)
    made = build_store(tmp_path / "stores", [(ALIGNED, 12)] * 3)
    total = 3 * 12 * ALIGNED.payload_bytes
    with running_daemon(tmp_path / "daemon.sock", total, made.store.path.parent):
        reader = Reader(tmp_path / "daemon.sock", made.store.path, seed=1, lease=True)
        reader.runtime.begin_step(Batch(1))
        assert reader.client.lease and not reader.client.lease_lost
        assert reader.client._attachment is not None
        reader.client._attachment.connection.send(Hint(77, b""))  # the daemon detaches who says such things
        wait_until(lambda: reader.client.lease_lost, "the step under way finds out", 60)
        reader.runtime.begin_step(Batch(1))
        assert not reader.client.lease_lost and reader.client.daemon_pid == 0
        assert reader.stats.loads == 36, "everything is read again: the daemon may have overwritten it"
        for layer in reader.runtime.layers.values():
            for expert in range(layer.experts):
                reader.check(layer, expert, layer.first + expert)
        reader.close()


def test_an_entry_shows_whether_its_worker_is_attached(tmp_path: Path) -> None:
    with Pool(tmp_path) as it:
        attached = attach(it)
        first = int(it.pool.table.attached[ENTRY])
        assert attached.is_attached and first
        it.pool.dismiss(ENTRY)
        assert not attached.is_attached
        it.pool.admit(ENTRY)
        assert not attached.is_attached and int(it.pool.table.attached[ENTRY]) != first
