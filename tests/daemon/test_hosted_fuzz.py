"""Workers at random over one pool: unreadable records, hints, prefills, limits that move, workers that come and go."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.daemon.pools import EXPERTS, LAYERS, Pool, Worker
from tests.daemon.wire import wait_until
from tests.runtime.record_stores import ALIGNED, MIXED
from vllm_moe_offload.daemon.table import ABSENT
from vllm_moe_offload.prefetch import loader
from vllm_moe_offload.store import RecordLayout

WORKERS, STEPS, LIMIT = 3, 250, 12


class Fuzzer:
    """One worker's thread."""

    def __init__(self, it: Pool, entry: int, seed: int):
        self.it, self.entry = it, entry
        self.draw = np.random.default_rng([seed, entry])
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        worker = Worker(self.it, self.entry)
        try:
            for _ in range(STEPS):
                self.step(worker)
                if self.draw.random() < 0.01:
                    self.it.pool.dismiss(self.entry)
                    worker = Worker(self.it, self.entry)
        except BaseException as error:
            self.failure = error
        finally:
            self.it.pool.dismiss(self.entry)

    def step(self, worker: Worker) -> None:
        table, experts = self.it.pool.table, self.some(3)
        if self.draw.random() < 0.4:
            self.it.pool.hint(self.entry, self.some(4), stream=bool(self.draw.random() < 0.3))
        worker.uses.note(experts)
        worker.reader.enter()
        slots = table.slot_of[experts]
        if (slots != ABSENT).all() and self.draw.random() < 0.8:
            worker.check(experts.tolist(), slots)
            worker.reader.leave()
            return
        worker.reader.leave()
        worker.ticket += 1
        supply = self.it.pool.demand(self.entry, worker.ticket, experts, bool(self.draw.random() < 0.3))
        assert {expert for expert, _ in supply.failed} == set(experts[supply.slots == ABSENT].tolist())
        there = supply.slots != ABSENT
        worker.check(experts[there].tolist(), supply.slots[there])
        worker.done()

    def some(self, most: int) -> np.ndarray:
        """Distinct experts of one layer."""
        count = self.draw.integers(1, most + 1)
        chosen = self.draw.integers(LAYERS) * EXPERTS + self.draw.permutation(EXPERTS)[:count]
        return chosen.astype(np.int32)


@pytest.mark.parametrize(("layout", "unreadable", "seed"), [(ALIGNED, 0.0, 0), (MIXED, 0.02, 1), (ALIGNED, 0.2, 2)])
def test_whatever_workers_do_records_are_right_and_everybody_is_answered(
    tmp_path: Path, layout: RecordLayout, unreadable: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, read = np.random.default_rng(seed), os.preadv

    def preadv(fd: int, buffers: list, offset: int) -> int:
        if broken.random() < unreadable:
            raise OSError(5, "EIO")
        return read(fd, buffers, offset)

    with Pool(tmp_path, limit=LIMIT, layout=layout) as it, monkeypatch.context() as patch:
        patch.setattr(loader.os, "preadv", preadv)
        workers = [Fuzzer(it, entry, seed) for entry in range(WORKERS)]
        draw = np.random.default_rng(seed)
        deadline = time.monotonic() + 120
        while any(worker.thread.is_alive() for worker in workers):
            assert time.monotonic() < deadline, "somebody is stuck"
            it.pool.tend()
            it.pool.check_integrity()
            it.pool.limit = int(draw.choice([1, 6, 8, LIMIT, 20, 32]))
            for worker in workers:
                worker.thread.join(0.001)
        for worker in workers:
            if worker.failure is not None:
                raise worker.failure
        wait_until(lambda: not it.pool.under_way.loads, "every load had ended")
        it.pool.limit = LIMIT
        it.tend()
        it.pool.check_integrity()
        assert not it.pool.cache.pins.any() and it.pool.held <= LIMIT
