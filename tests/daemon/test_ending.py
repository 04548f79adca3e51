"""A daemon that is told to end: histories are written, and engines keep the experts they had, however long it takes."""

import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.daemon.past import FINGERPRINT, SHAPE, past_request
from tests.daemon.pools import Pool, Worker
from tests.daemon.processes import DaemonProcess
from tests.daemon.reading_worker import Reader
from tests.daemon.wire import wait_until
from tests.runtime.record_stores import ALIGNED, build_store
from vllm_moe_offload.client.connection import Connection
from vllm_moe_offload.daemon.socket_file import SocketFile
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.ipc.protocol import OpenHistory, Remember
from vllm_moe_offload.ipc.trace_codec import pack_trace
from vllm_moe_offload.trace.archive import HistoryArchive


def test_engines_are_served_while_histories_are_written_and_keep_what_they_had(tmp_path: Path) -> None:
    made = build_store(tmp_path / "stores", [(ALIGNED, 12)] * 3)
    kept = tmp_path / "history"
    command = [sys.executable, "-m", "tests.daemon.slow_daemon", str(tmp_path)]
    daemon = DaemonProcess(
        tmp_path / "socket", 200_000, made.store.path.parent, "--history", str(kept), command=command
    )
    try:
        with closing(Connection.connect(tmp_path / "socket", "history", 60)) as history:
            history.request(OpenHistory(FINGERPRINT, SHAPE, made.store.path.name))
            history.request(Remember(pack_trace(past_request(1))))
        reader = Reader(tmp_path / "socket", made.store.path, seed=1)
        for _ in range(5):
            reader.step()
        daemon.terminate()
        wait_until((tmp_path / "saving").exists, "the history is being written", 60)
        for _ in range(5):
            reader.step()
        assert reader.client.daemon_pid == daemon.pid, "it is served while the history is written"
        (tmp_path / "saved").touch()
        wait_until((tmp_path / "ending").exists, "nobody is connected any more", 60)
        resident = np.count_nonzero(reader.client._tables[0].slot_of >= 0)
        for _ in range(100):
            reader.step()
        assert resident > 0 and f"going on without it, with {resident} experts" in reader.said[-1]
        assert daemon.lives, "although the daemon has not ended yet"
        (tmp_path / "ended").touch()
        daemon.wait()
        reader.close()
        assert HistoryArchive(kept).outline(FINGERPRINT) is not None
    finally:
        daemon.abandon()


def test_what_workers_have_seen_stays_true_when_the_daemon_ends(tmp_path: Path) -> None:
    with Pool(tmp_path, limit=8) as pool:
        worker = Worker(pool, 3)
        worker.use([0, 1, 2, 3, 4, 5])
        shown = {expert: int(slot) for expert, slot in enumerate(pool.pool.table.slot_of) if slot >= 0}
        assert len(shown) == 6
        pool.pool.freeze()
        assert pool.pool.table.frozen
        pool.pool.dismiss(3)
        pool.pool.limit = 2
        for _ in range(5):
            pool.pool.run_maintenance()
        for expert, slot in shown.items():
            assert pool.holds(slot, expert), "an engine may go on with it"


def test_a_daemon_says_whose_end_it_waits_for(tmp_path: Path, said: list[str]) -> None:
    leaving = SocketFile.claim(tmp_path / "socket", None)
    leaving.remove()
    with pytest.raises(OffloadError, match="neither serves nor leaves"):
        SocketFile.claim(tmp_path / "socket", None, 0.1)
    (line,) = said
    assert line.startswith("waiting for a daemon (pid ") and line.endswith(f"that is leaving {tmp_path / 'socket'}")
    leaving.release()
