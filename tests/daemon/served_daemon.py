"""A daemon's door in this process, before models of the simplest sort: every expert lies in the slot of its number."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from tests.log_lines import LogLines
from vllm_moe_offload.client.connection import Connection
from vllm_moe_offload.daemon.histories import DaemonHistories
from vllm_moe_offload.daemon.server import DaemonServer
from vllm_moe_offload.daemon.socket_file import SocketFile
from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.ipc.protocol import (
    Attach,
    Attached,
    Demand,
    Hint,
    ImportSlots,
    ModelStatus,
    PoolInfo,
    SlotsImported,
    Supplied,
    WorkerStatus,
    pack_ids,
    unpack_ids,
)
from vllm_moe_offload.stats import MODEL_STATISTICS, WORKER_STATISTICS, Stats

EXPERTS = 64
STORE = "f" * 32
ATTACH = Attach(STORE, 4711, 1 << 20, False, "engine", 0)


class MemoryModels:
    """One store of ``EXPERTS`` experts in one pool; remembers what it was asked."""

    def __init__(self) -> None:
        self.attached: dict[int, MemoryWorker] = {}
        self.attach_count = 0
        self.arena = os.memfd_create("arena", os.MFD_CLOEXEC)
        self.table = os.memfd_create("table", os.MFD_CLOEXEC)
        self.lock = threading.Lock()

    def attach(self, request: Attach) -> "MemoryWorker":
        if request.store != STORE:
            raise StoreError(f"no store {request.store!r} here; there is {STORE}")
        with self.lock:
            worker = min(set(range(64)) - self.attached.keys())
            self.attached[worker] = MemoryWorker(self, worker, request)
            self.attach_count += 1
            return self.attached[worker]

    def status(self) -> list[ModelStatus]:
        hits = Stats(hits=3).as_dict(WORKER_STATISTICS)
        with self.lock:
            workers = [
                WorkerStatus(number, each.request.pid, each.request.group, each.request.rank, False, hits)
                for number, each in self.attached.items()
            ]
        stats = Stats(loads=5, experts=EXPERTS, slots=EXPERTS, resident_experts=8, resident_bytes=800)
        return [ModelStatus(STORE, "tiny", stats.as_dict(MODEL_STATISTICS), workers)]

    def freeze(self) -> None:
        """Nothing ever changes here."""

    def close(self) -> None:
        os.close(self.arena)
        os.close(self.table)


class MemoryWorker:
    def __init__(self, models: MemoryModels, worker: int, request: Attach) -> None:
        self.reply = Attached(worker, False, [PoolInfo(EXPERTS, EXPERTS, 4096, 4096)])
        self.fds = [models.arena, models.table]
        self.request = request
        self.hints: list[list[int]] = []
        self.imported: list[os.stat_result] = []
        self._models = models
        self._ticket = 0

    def demand(self, request: Demand) -> Supplied:
        if request.ticket <= self._ticket:
            raise ValueError(f"ticket {request.ticket} does not rise above {self._ticket}")
        experts = self._experts(request.pool, request.experts)
        self._ticket = request.ticket
        return Supplied(request.ticket, pack_ids(np.array(experts)), 0, 0)

    def hint(self, request: Hint) -> None:
        self.hints.append(self._experts(request.pool, request.experts))

    def import_slots(self, request: ImportSlots, fd: int) -> SlotsImported:
        try:
            self.imported.append(os.fstat(fd))
        finally:
            os.close(fd)
        return SlotsImported(len(self._experts(request.pool, request.experts)))

    def detach(self) -> None:
        with self._models.lock:
            self._models.attached.pop(self.reply.worker, None)

    def _experts(self, pool: int, data: bytes) -> list[int]:
        experts = unpack_ids(data).tolist()
        if pool != 0 or len(set(experts)) != len(experts) or not all(0 <= expert < EXPERTS for expert in experts):
            raise ValueError(f"pool {pool} has no such experts")
        return experts


class ServedDaemon:
    """A served daemon: ``models`` behind ``path``. Leaving the context ends it and waits for its end."""

    def __init__(
        self, path: Path, group: int | None = None, leave_after: float | None = None, history: Path | None = None
    ) -> None:
        self.path = path
        self.models = MemoryModels()
        self._log = LogLines()
        self.lines = self._log.attach()
        self.place = SocketFile.claim(path, group)
        self.histories = DaemonHistories(history)
        self.server = DaemonServer(self.place, self.models, self.histories, 1 << 30, group, leave_after)
        self.reason = ""
        self.thread = threading.Thread(target=self._serve, name="served", daemon=True)
        self.thread.start()

    def connect(self, role: str = "worker", timeout: float = 10) -> Connection:
        return Connection.connect(self.path, role, timeout)

    @contextmanager
    def worker(self) -> Iterator[Connection]:
        """An attached worker."""
        connection = self.connect()
        try:
            connection.request(ATTACH)
            for fd in connection.take_fds():
                os.close(fd)
            yield connection
        finally:
            connection.close()

    def __enter__(self) -> "ServedDaemon":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not self.server.stop, which a test may have taken from its peers.
        DaemonServer.stop(self.server, "the test is over")
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.models.close()
        self.histories.close()
        self.place.release()
        self._log.detach()

    def _serve(self) -> None:
        self.reason = self.server.serve()
