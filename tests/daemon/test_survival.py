"""kill -9 at any moment: workers go on with the right records, come back, and leave nothing behind."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from tests.daemon.killing import run
from tests.daemon.processes import DaemonProcess
from tests.daemon.reading_worker import Reader
from tests.daemon.serving import serving
from tests.daemon.wire import wait_until
from tests.runtime.record_stores import ALIGNED, build_store


def test_whoever_dies_nobody_computes_on_a_wrong_record(tmp_path: Path) -> None:
    host = run(tmp_path, kills=12, workers=2, seed=1)
    assert host.failovers > 0 and host.comebacks > 0 and host.stops > 0 and host.leases > 0


def shared_memory_held() -> int:
    """Descriptors of arenas and tables in this process."""
    links = (Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd"))  # noqa: PTH208 - names, before they go
    held = 0
    for link in links:
        with suppress(FileNotFoundError):
            held += "memfd:moe-offload" in os.readlink(link)  # noqa: PTH115 - it names no path
    return held


def test_what_a_worker_counts_is_seen_in_the_daemon_s_status(tmp_path: Path) -> None:
    made = build_store(tmp_path / "stores", [(ALIGNED, 12)] * 3)
    with serving(tmp_path / "daemon.sock", made.store.path.parent) as models:
        reader = Reader(tmp_path / "daemon.sock", made.store.path, seed=1)
        for _ in range(10):
            reader.step()
        reader.client.pools["layer 0"].begin_step()  # which shows what was counted before
        (model,) = models.status()
        counted = reader.stats
        assert counted.tokens >= counted.steps == 10
        for name in ("hits", "misses", "steps", "tokens"):
            assert model.stats[name] == model.workers[0].stats[name] == getattr(counted, name) > 0
        reader.close()


def test_a_daemon_too_small_for_a_lease_is_declined(tmp_path: Path) -> None:
    held_by_others = shared_memory_held()
    made = build_store(tmp_path / "stores", [(ALIGNED, 12)] * 3)
    total = 3 * 12 * ALIGNED.payload_bytes
    socket, root = tmp_path / "daemon.sock", made.store.path.parent
    daemon = DaemonProcess(socket, 2 * total, root)
    try:
        reader = Reader(socket, made.store.path, seed=1, lease=True)
        assert reader.client.lease and shared_memory_held() == held_by_others + 2
        daemon.kill()
        daemon = DaemonProcess(socket, total // 2, root)
        wait_until(lambda: any("no room for every expert" in line for line in reader.said), "it has been refused", 30)
        wait_until(lambda: not daemon.status().models[0].workers, "the daemon is left alone")
        assert shared_memory_held() == held_by_others + 2
        for _ in range(5):
            reader.step()
        assert reader.stats.loads == 0, "what was loaded is still there"
        reader.close()
        assert shared_memory_held() == held_by_others
        daemon.stop()
    finally:
        daemon.abandon()


def test_a_step_cut_up_before_its_model_shrank_outlives_the_daemon(tmp_path: Path) -> None:
    made = build_store(tmp_path / "stores", [(ALIGNED, 12)] * 3)
    daemon = DaemonProcess(tmp_path / "daemon.sock", 1 << 20, made.store.path.parent)
    try:
        reader = Reader(tmp_path / "daemon.sock", made.store.path, seed=1)
        layer = next(iter(reader.runtime.layers.values()))
        assert layer.pool.capacity > 10
        waves = reader.runtime.serve(layer, np.arange(10)[None])
        reader.client._tables[0].limit = 2
        daemon.kill()
        (wave,) = waves
        assert not reader.runtime.has_failures and reader.client.daemon_pid == 0
        for expert, slot in enumerate(wave.slots[0].tolist()):
            reader.check(layer, expert, slot)
        reader.close()
    finally:
        daemon.abandon()
