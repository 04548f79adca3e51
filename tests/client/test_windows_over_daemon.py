"""Windows of a device over host memory that a daemon keeps: copies read what it may not overwrite meanwhile."""

import os
from pathlib import Path

import pytest

from tests.daemon.processes import DaemonProcess
from tests.daemon.reading_worker import Reader
from tests.daemon.wire import wait_until
from tests.device.virtual import VirtualDevice
from tests.runtime.record_stores import RecordStore, build_store, layout
from tests.windows.window_runtimes import WindowRuntime
from vllm_moe_offload.client import client
from vllm_moe_offload.client.client import REJOINING, DaemonClient
from vllm_moe_offload.ipc.protocol import Attach
from vllm_moe_offload.stats import Stats
from vllm_moe_offload.store import Store

SMALL, LARGE = layout(8192, 4096), layout(6000, 100)
LAYERS = [(SMALL, 12), (LARGE, 12)] * 5
SLOTS = {f"layer {number}": 4 for number in range(len(LAYERS))}
BUDGET = 760 << 10
"""Of 1.1 MiB: what two workers want does not fit."""
TOP_K = 3


class DaemonHost:
    """Host memory of a daemon, as a test's windows use it."""

    def __init__(self, made: RecordStore, socket: Path, lease: bool = False):
        self.made, self.store = made, Store.open(made.store.path)
        wanted = sum(entry.layout.payload_bytes * entry.experts for entry in self.store.layers)
        request = Attach(self.store.path.name, os.getpid(), wanted, lease, "windows", 0, [TOP_K, TOP_K])
        self.client = DaemonClient(socket, request, self.store, "lfu", None, Stats())
        self.pools = self.client.pools


def test_daemons_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.05)
    made = build_store(tmp_path / "stores", LAYERS)
    socket, root = tmp_path / "daemon.sock", made.store.path.parent
    daemon = DaemonProcess(socket, BUDGET, root)
    try:
        host = DaemonHost(made, socket)
        windows = WindowRuntime(host, VirtualDevice(1), SLOTS, seed=1, source=host.client)
        windows.speculate()
        assert "may be exchanged" in windows.windows.unregistered and not windows.device.registered
        other = Reader(socket, made.store.path, seed=2)
        for rows in (1, 2, 1, 20, 1, 1, 20, 2) * 3:
            windows.step(rows, TOP_K)
            other.step()
        assert windows.runtime.stats.host_hits > 0
        daemon.kill()
        for rows in (1, 20, 1):
            windows.step(rows, TOP_K)
        assert host.client.daemon_pid == 0
        daemon = DaemonProcess(socket, BUDGET, root)
        wait_until(lambda: host.client.state is REJOINING, "the next daemon has attached it", 60)
        for rows in (1, 2, 20, 1, 1):
            windows.step(rows, TOP_K)
            other.step()
        assert host.client.daemon_pid
        windows.drain()
        windows.close()
        host.client.close()
        other.close()
        daemon.stop()
    finally:
        daemon.abandon()


def test_memory_of_a_lease_is_read_where_it_lies(tmp_path: Path) -> None:
    """A daemon without one gives pages back and takes others: a GPU would go on reading the first ones."""
    made = build_store(tmp_path / "stores", LAYERS)
    socket = tmp_path / "daemon.sock"
    daemon = DaemonProcess(socket, 4 * BUDGET, made.store.path.parent)
    try:
        host = DaemonHost(made, socket, lease=True)
        assert host.client.lease
        windows = WindowRuntime(host, VirtualDevice(1), SLOTS, seed=1, source=host.client)
        assert windows.device.registered and not windows.windows.unregistered
        for rows in (1, 2, 20, 1):
            windows.step(rows, TOP_K)
        windows.drain()
        daemon.kill()
        windows.step(1, TOP_K)
        windows.step(20, TOP_K)
        windows.drain()
        assert host.client.daemon_pid == 0
        assert "may be exchanged" in windows.windows.unregistered and not windows.device.registered
        windows.close()
        host.client.close()
    finally:
        daemon.abandon()
