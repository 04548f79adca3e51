"""Demands of absent experts as an engine makes them: its own pools, slots, loader and threads, without a model."""

import random
from typing import Self

import numpy as np

from vllm_moe_offload.slots import Ledger, embedded_pools
from vllm_moe_offload.store.layout import RecordLayout
from vllm_moe_offload.store.reader import Store


class Demands:
    """An engine's pools over `store` with a share of the experts. A context manager: its threads end with it.

    All slots are filled, and every record has been verified once, before the first demand.
    """

    def __init__(self, store: Store, share: float, seed: int = 0) -> None:
        self._draw = random.Random(seed)
        self._ledger = Ledger()
        experts: dict[RecordLayout, int] = {}
        self._spans: list[tuple[RecordLayout, range]] = []
        for entry in store.layers:
            first = experts.get(entry.layout, 0)
            experts[entry.layout] = first + entry.experts
            self._spans.append((entry.layout, range(first, first + entry.experts)))
        self.slots = {layout: max(1, int(count * share)) for layout, count in experts.items()}
        self._pools = embedded_pools(store, self.slots, "lru", None, self._ledger)

    def __enter__(self) -> Self:
        for layout, span in self._spans:
            step = min(len(span), self.slots[layout])
            for first in range(0, len(span), step):
                self._hold(layout, span, list(span)[first : first + step])
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.close()

    def load(self, count: int) -> tuple[float, int]:
        """Demand `count` absent experts of one layer: seconds the pass waits for them, and bytes read.

        Raises:
            LoadError: a record could not be read.
            ValueError: no layer has so many absent experts.
        """
        spans = [(layout, span) for layout, span in self._spans if len(self._absent(layout, span)) >= count]
        if not spans:
            raise ValueError(f"no layer has {count} absent experts")
        layout, span = self._draw.choice(spans)
        before = self._ledger.counters.stall_seconds
        self._hold(layout, span, sorted(self._draw.sample(self._absent(layout, span), count)))
        return self._ledger.counters.stall_seconds - before, count * layout.record_bytes

    def _absent(self, layout: RecordLayout, span: range) -> list[int]:
        return (self._pools[layout].absent(span).nonzero()[0] + span.start).tolist()

    def _hold(self, layout: RecordLayout, span: range, experts: list[int]) -> None:
        pool = self._pools[layout]
        pool.begin_step()
        hold = pool.hold(span, np.array(experts, dtype=np.int64))
        pool.release(hold)
        for failure in hold.failures:
            raise failure.error
