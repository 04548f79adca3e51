"""A worker that does at random whatever a worker may do with a pool, and checks every record it would compute on."""

import threading

import numpy as np

from tests.daemon.pools import EXPERTS, LAYERS, Pool, Worker
from vllm_moe_offload.ipc.table import ABSENT

STEPS = 250


class Fuzzer:
    """One worker's thread."""

    def __init__(self, it: Pool, entry: int, seed: int, steps: int = STEPS):
        self.it, self.entry = it, entry
        self.steps = steps
        self.draw = np.random.default_rng([seed, entry])
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        worker = Worker(self.it, self.entry)
        try:
            for _ in range(self.steps):
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
