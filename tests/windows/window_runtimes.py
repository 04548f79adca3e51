"""A runtime over windows of a virtual device, whose kernels compare what they read with the records of a store."""

import random
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
import torch

from tests.device.virtual import CorruptionError, VirtualDevice
from tests.runtime.record_stores import RecordStore
from vllm_moe_offload.load_report import LoadReport
from vllm_moe_offload.pool import local_pools
from vllm_moe_offload.runtime import Batch, OffloadRuntime, PooledLayer, Wave
from vllm_moe_offload.stats import Stats
from vllm_moe_offload.store import Store
from vllm_moe_offload.store.pools import pools_of
from vllm_moe_offload.windows.host_managed import HostManaged
from vllm_moe_offload.windows.memory import View
from vllm_moe_offload.windows.plan import WindowPlan


class Speculativeer:
    """Prefetches at random between two layers, as a prefetcher does."""

    predicts = False

    def __init__(self, runtime: OffloadRuntime, order: random.Random):
        self._layers = list(runtime.layers.values())
        self._pools = {id(layer.pool): layer.pool for layer in self._layers}.values()
        for pool in self._pools:
            pool.enable_predictions()
        self._runtime, self._order, self._at = runtime, order, -1

    def begin_step(self) -> None:
        self._at = -1

    def look_ahead(self) -> None:
        self._at += 1
        for layer in self._layers[self._at + 1 : self._at + 3]:
            absent = layer.first + np.flatnonzero(layer.pool.absent(layer.span))
            if len(absent) and self._order.random() < 0.7:
                wanted = np.array(self._order.sample(absent.tolist(), min(2, len(absent))))
                layer.pool.expect(layer.span, np.float32(self._order.random()))
                self._runtime.stats.add(layer.pool.prefetch(layer.span, wanted))

    def note(self, report: LoadReport) -> None: ...


class Host:
    """An open store and host pools over it, which several runtimes may use one after the other.

    Args:
        slots: of the pool of each layout.
    """

    def __init__(self, made: RecordStore, slots: int):
        self.made, self.store = made, Store.open(made.store.path)
        self.pools = local_pools(self.store, {entry.layout: slots for entry in self.store.layers}, "lfu", None)

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
        self.store.close()


class WindowRuntime:
    """Runs steps of random routing; ``drain`` looks at what the kernels have read.

    Args:
        slots: of each layer's window.
    """

    def __init__(self, host: Host, device: VirtualDevice, slots: Mapping[str, int], seed: int, source: Any = None):
        self.host, self.made, self.device = host, host.made, device
        plans = {
            members.layout: WindowPlan.of(
                members.counts,
                [slots[host.store.layers[index].name] for index in members.layers],
                [part.nbytes for part in members.layout.components],
            )
            for members in pools_of(host.store.layers)
        }
        self.windows = HostManaged(device, host.store.layers, plans, host.pools, "lfu", source)
        self.runtime = OffloadRuntime(host.store, self.windows.pools, Stats(), self.windows)
        self.order = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.views: set[int] = set()
        self.damaged: set[tuple[int, int]] = set()
        self.speculativeer: Speculativeer | None = None

    def speculate(self) -> None:
        """From now on, prefetch at random between the layers."""
        self.speculativeer = Speculativeer(self.runtime, self.order)
        self.runtime.prefetcher = self.speculativeer  # type: ignore[assignment]

    def step(self, rows: int, top_k: int) -> None:
        self.runtime.begin_step(Batch(rows))
        if self.speculativeer is not None:
            self.speculativeer.begin_step()
        for layer in self.runtime.layers.values():
            order = self.numbers.random((rows, layer.experts)) * self.numbers.random(layer.experts)
            self.serve(layer, order.argsort(axis=1)[:, :top_k].astype(np.int32))

    def serve(self, layer: PooledLayer, chosen: np.ndarray) -> None:
        with closing(self.runtime.serve(layer, chosen)) as waves:
            for wave in waves:
                assert wave.rows is None, "windows need no waves"
                self.enqueue_kernel(layer, chosen, wave)
        self.check_failures(layer, chosen)

    def enqueue_kernel(self, layer: PooledLayer, chosen: np.ndarray, wave: Wave) -> None:
        """A kernel that reads the rows it was given when it runs, and compares them with the records."""
        self.views.add(int(wave.view))
        pool = layer.pool
        rows = pool.memory.tensors(pool.member, View(wave.view))
        pairs = sorted({*zip(wave.slots.ravel().tolist(), chosen.ravel().tolist(), strict=True)})
        pairs = [(slot, expert) for slot, expert in pairs if expert >= 0 and (layer.index, expert) not in self.damaged]
        assert all(0 <= slot < layer.experts for slot, _ in pairs), "an id of a kernel is not below E"

        def reads() -> list[torch.Tensor]:
            return [component[slot] for slot, _ in pairs for component in rows]

        def check(values: list[torch.Tensor]) -> None:
            wanted = [part for _, expert in pairs for part in self.made.records[layer.index][expert]]
            for value, right in zip(values, wanted, strict=True):
                if not np.array_equal(np.asarray(value), right):
                    raise CorruptionError(f"{layer.name} computed with other bytes")

        self.device.kernel(self.device.main, reads, check, name=layer.name)

    def check_failures(self, layer: PooledLayer, chosen: np.ndarray) -> None:
        failures, rows = self.runtime.take_failures()
        lost = [expert for index, expert in self.damaged if index == layer.index]
        assert rows == set(np.flatnonzero(np.isin(chosen, lost).any(axis=1)).tolist())
        assert bool(failures) == bool(rows)

    def drain(self) -> None:
        self.device.drain()
        self.check_residency()

    def check_residency(self) -> None:
        """What the tables of windows say, and nothing held that has been read."""
        for layer in self.runtime.layers.values():
            cache = layer.pool.cache
            cache.check_integrity()
            speculated = layer.pool._speculated
            assert np.flatnonzero(cache.pins).tolist() == ([] if speculated is None else [speculated.slot])

    def check_contents(self) -> None:
        """Every record that is said to be in a slot is there, and nothing of the host pools is held."""
        self.runtime.begin_step(Batch(1))
        self.device.drain()
        assert not any(pool._operations.held for pool in self.host.pools.values())
        for layer in self.runtime.layers.values():
            pool = layer.pool
            for slot in np.flatnonzero(pool.cache.expert_of >= 0).tolist():
                expert = int(pool.cache.expert_of[slot])
                parts = pool.memory.slot(pool.member, slot)
                for part, right in zip(parts, self.made.records[layer.index][expert], strict=True):
                    assert np.array_equal(part.numpy(), right)

    def close(self) -> None:
        """The host pools stay open."""
        self.windows.close()
