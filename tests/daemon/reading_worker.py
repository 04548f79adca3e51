"""A worker process that serves random steps from a daemon's slots and checks every record it would compute on.

    python -m tests.daemon.reading_worker SOCKET STORE SEED [--lease]

Each line on stdin names a number of steps; when they are done a line of JSON says so. It ends with its input. A record
that is not what it should be ends it with exit code 3. With a lease it computes on every expert where it should be,
without looking, as long as the lease is kept.
"""

import json
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.daemon.waits import Waits
from tests.log_lines import LogLines
from vllm_moe_offload.client.client import DaemonClient
from vllm_moe_offload.ipc.protocol import Attach
from vllm_moe_offload.pool import SlotPool
from vllm_moe_offload.runtime import Batch, OffloadRuntime, PooledLayer
from vllm_moe_offload.stats import WORKER_STATISTICS, Stats
from vllm_moe_offload.store import Store

TOP_K = 3
WRONG = 3


class Reader:
    """A forward pass without a model."""

    def __init__(self, socket: Path, store: Path, seed: int, lease: bool = False):
        self.store = Store.open(store)
        self.random = np.random.default_rng(seed)
        self._log = LogLines(within="client")
        self.said = self._log.attach()
        self.waits = Waits()
        wanted = sum(entry.layout.payload_bytes * entry.experts for entry in self.store.layers)
        layouts = len({entry.layout for entry in self.store.layers})
        request = Attach(
            store.name, os.getpid(), wanted if lease else wanted // 4, lease, f"engine {seed}", 0, [TOP_K] * layouts
        )
        self.stats = Stats()
        self.client = DaemonClient(socket, request, self.store, "lfu", None, self.stats)
        self.runtime = OffloadRuntime(self.store, self.client.pools, self.stats, self.client)
        self._predicted: set[SlotPool] = set()
        """Pools that have been told that predictions follow."""
        self._preference = {layer.name: self.random.random(layer.experts) for layer in self.runtime.layers.values()}

    def step(self) -> None:
        """One forward pass of a few rows, sometimes a long one; most of it among the experts this worker prefers."""
        rows = int(self.random.choice([1, 1, 2, 4, 64]))
        with self._waiting():
            self.runtime.begin_step(Batch(rows))
        wrong = []
        for layer in self.runtime.layers.values():
            noise = self.random.random((rows, layer.experts)) * self._preference[layer.name]
            chosen = np.argsort(-noise, axis=1)[:, :TOP_K].astype(np.int32)
            if self.client.lease:
                wrong += [(layer, expert) for expert in set(chosen.ravel().tolist()) if not self.is_home(layer, expert)]
            else:
                self.serve(layer, chosen)
        if wrong and not self.client.lease_lost:
            self.check(wrong[0][0], wrong[0][1], wrong[0][0].first + wrong[0][1])

    def serve(self, layer: PooledLayer, chosen: NDArray[np.int32]) -> None:
        guess = self.random.permutation(layer.experts)[:2] + layer.first
        waves = iter(self.runtime.serve(layer, chosen))
        while True:
            with self._waiting():
                wave = next(waves, None)
            if wave is None:
                break
            if layer.pool not in self._predicted:
                self._predicted.add(layer.pool)
                layer.pool.enable_predictions()
            layer.pool.expect(layer.span, self._preference[layer.name].astype(np.float32))
            self.stats.add(layer.pool.prefetch(layer.span, guess))
            mine = chosen if wave.rows is None else chosen[wave.rows]
            for expert, slot in {*zip(mine.ravel().tolist(), wave.slots.ravel().tolist(), strict=True)}:
                self.check(layer, expert, slot)
        failures, _ = self.runtime.take_failures()
        if failures:
            raise failures[0]

    def _waiting(self) -> AbstractContextManager[None]:
        return self.waits.measured(os.getpid(), self.client.daemon_pid)

    def is_home(self, layer: PooledLayer, expert: int) -> bool:
        return self.is_right(layer, expert, layer.first + expert)

    def is_right(self, layer: PooledLayer, expert: int, slot: int) -> bool:
        parts = [component[slot] for component in layer.pool.memory.components]
        return self.store.record_digest(parts) == self.store.checksum(layer.index, expert)

    def check(self, layer: PooledLayer, expert: int, slot: int) -> None:
        if not self.is_right(layer, expert, slot):
            print(f"WRONG: expert {expert} of {layer.name} in slot {slot}", file=sys.stderr, flush=True)
            os._exit(WRONG)

    def report(self) -> dict[str, object]:
        return self.stats.as_dict(WORKER_STATISTICS) | {
            "daemon_pid": self.client.daemon_pid,
            "said": self.said,
            "lease": self.client.lease,
            "waits": self.waits.long,
            "longest_wait": self.waits.longest,
        }

    def close(self) -> None:
        self.client.close()
        self.runtime.close()
        self._log.detach()


def main() -> None:
    reader = Reader(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), "--lease" in sys.argv)
    print(json.dumps(reader.report()), flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            reader.step()
        print(json.dumps(reader.report()), flush=True)
    reader.close()


if __name__ == "__main__":
    main()
