"""Pools of a daemon over real stores, and workers that check every record they compute on."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.runtime.record_stores import ALIGNED, RecordStore, build_store
from vllm_moe_offload.daemon.pool import DaemonPool
from vllm_moe_offload.ipc.epochs import Reader
from vllm_moe_offload.ipc.table import ABSENT, DONE
from vllm_moe_offload.ipc.uses import UseWriter
from vllm_moe_offload.pool.loader import RecordLoader
from vllm_moe_offload.store import RecordLayout

LAYERS, EXPERTS = 4, 8
N = LAYERS * EXPERTS


class Pool:
    """A pool with its store; closed as a context."""

    def __init__(self, root: Path, limit: int = N, layout: RecordLayout = ALIGNED, policy: str = "lfu"):
        self.built: RecordStore = build_store(root, [(layout, EXPERTS)] * LAYERS)
        self.loader = RecordLoader(self.built.store)
        self.maintenance_requests = 0
        self.pool = DaemonPool("test", self.built.store, layout, self.loader, policy, limit, self._request_maintenance)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()
        self.built.store.close()

    def _request_maintenance(self) -> None:
        self.maintenance_requests += 1

    def holds(self, slot: int, expert: int) -> bool:
        expected = self.built.records[expert // EXPERTS][expert % EXPERTS]
        return all(np.array_equal(a, b) for a, b in zip(self.pool.arena.slot(slot), expected, strict=True))

    def run_maintenance(self) -> None:
        while self.pool.run_maintenance():
            pass


class Worker:
    """What an engine does, in this process: looks up, asks, checks, is done."""

    def __init__(self, pool: Pool, entry: int):
        self.it, self.entry = pool, entry
        pool.pool.admit(entry)
        self.reader = Reader(pool.pool.table, entry)
        self.uses = UseWriter(pool.pool.table, entry)
        self.ticket = 0

    def demand(self, experts: list[int], stream: bool = False) -> NDArray[np.int32]:
        """Demanded, checked and still held."""
        self.ticket += 1
        supply = self.it.pool.demand(self.entry, self.ticket, np.array(experts, np.int32), stream)
        assert not supply.failed
        self.check(experts, supply.slots)
        self.loaded, self.joined = supply.loaded, supply.joined
        return supply.slots

    def done(self) -> None:
        self.it.pool.table.entries[self.entry, DONE] = self.ticket

    def use(self, experts: list[int]) -> bool:
        """As a layer does: in place if all are there, else by demand. Returns whether it had to ask."""
        self.uses.note(np.array(experts, np.int32))
        self.reader.enter()
        slots = self.it.pool.table.slot_of[experts]
        asks = bool((slots == ABSENT).any())
        if asks:
            self.reader.leave()
            self.demand(experts)
            self.done()
        else:
            self.check(experts, slots)
            self.reader.leave()
        return asks

    def check(self, experts: list[int], slots: NDArray[np.int32]) -> None:
        for expert, slot in zip(experts, slots.tolist(), strict=True):
            assert self.it.holds(slot, expert), f"slot {slot} does not hold expert {expert}"
