"""What pools report is what their caches and loaders have really done: each thing once, whoever asked for it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.record_stores import ODD, RecordStore, build_store
from tests.runtime.test_runtime_serves import runtime_of
from vllm_moe_offload.cache import POLICY_NAMES
from vllm_moe_offload.cache.cache import ABSENT
from vllm_moe_offload.load_report import NOTHING, LoadReport
from vllm_moe_offload.pool.loader import Load
from vllm_moe_offload.pool.local import LocalPool
from vllm_moe_offload.runtime import Batch, OffloadRuntime
from vllm_moe_offload.runtime import runtime as runtime_module
from vllm_moe_offload.stats import Stats

EXPERTS, LAYERS, TOP_K = 8, 3, 2
NEEDED = ("hold", "hold_streaming", "start_hold")
REPORTED = (*NEEDED, "find", "finish_hold", "wait_for", "settle", "stream_ahead", "abandon", "prefetch", "begin_step")


class Audit:
    """Adds up what a pool reports, and compares every report with what the call has changed."""

    def __init__(self, pool: LocalPool):
        self.pool = pool
        self.total = NOTHING
        self.needed = self.missing = self.submitted = 0
        self.unused: set[int] = set()
        """Speculative loads that no layer has used yet."""
        for name in REPORTED:
            setattr(pool, name, self._audited(name, getattr(pool, name)))
        acquire, stream = pool.cache.acquire, pool.cache.stream
        self._last_missing = 0

        def noted(acquired: Any) -> Any:
            self._last_missing = len(acquired.missing)
            return acquired

        pool.cache.acquire = lambda experts: noted(acquire(experts))  # type: ignore[method-assign]
        pool.cache.stream = lambda experts, share: noted(stream(experts, share))  # type: ignore[method-assign]
        loader = pool.loader
        start, demand = loader.start, loader.demand

        def started(loads: Sequence[Load], speculative: bool = False) -> None:
            self.submitted += len(loads)
            start(loads, speculative=speculative)

        def demanded(loads: Sequence[Load]) -> None:
            self.submitted += len(loads)
            demand(loads)

        loader.start, loader.demand = started, demanded  # type: ignore[method-assign]

    def _resident(self) -> set[int]:
        return set(np.flatnonzero(self.pool.cache.slot_of != ABSENT).tolist())

    def _audited(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def audited(*arguments: Any) -> Any:
            before = self._resident()
            result = call(*arguments)
            if result is None:
                return None
            report = result[1] if isinstance(result, tuple) and not isinstance(result, LoadReport) else result
            self._check(name, arguments, report, before)
            self.total += report
            return result

        return audited

    def _check(self, name: str, arguments: tuple[Any, ...], report: LoadReport, before: set[int]) -> None:
        after = self._resident()
        assert all(value >= 0 for value in report)
        assert report.late_seconds <= report.waited
        needed: set[int] = set()
        if name in NEEDED or name == "find":
            needed = set(arguments[-1].tolist())
            missing = 0 if name == "find" else self._last_missing
            assert (report.hits, report.misses) == (len(needed) - missing, missing)
            self.needed, self.missing = self.needed + len(needed), self.missing + missing
        else:
            assert report.hits == report.misses == 0
        used = self.unused & (set(arguments[0]) if name == "settle" else needed)
        assert report.useful + report.late == len(used)
        self.unused -= used
        gone = self.unused - after
        assert report.wasted + report.withdrawn == len(gone)
        self.unused -= gone
        assert report.evicted + report.withdrawn == len(before - after)
        started = after - before if name == "prefetch" else set()
        assert report.started == len(started)
        self.unused |= started
        assert (report.streamed > 0) <= (name == "stream_ahead")

    def check_totals(self, stats: Stats) -> None:
        """Between layers, when no hold is open."""
        total = self.total
        assert (total.hits + total.misses, total.misses) == (self.needed, self.missing)
        assert total.started - total.withdrawn == total.useful + total.late + total.wasted + len(self.unused)
        assert total.loads + len(self.pool.in_flight.loads) == self.submitted - total.withdrawn
        assert total.loaded_bytes == total.loads * ODD.payload_bytes
        ahead = total.prefetched_bytes + total.streamed_bytes
        assert total.loaded_bytes == ahead + total.demanded * ODD.payload_bytes
        assert total.prefetched_bytes <= total.started * ODD.payload_bytes
        assert total.streamed_bytes <= total.streamed * ODD.payload_bytes
        assert total.misses == total.demanded and total.failed == 0
        added = Stats(steps=stats.steps, tokens=stats.tokens, waves=stats.waves)
        added.add(total)
        for field in fields(Stats):
            assert getattr(added, field.name) == pytest.approx(getattr(stats, field.name)), field.name


class Guesses:
    """In place of a prefetcher: any experts at all, between any two layers."""

    def __init__(self, runtime: OffloadRuntime, seed: int):
        self._runtime, self._random = runtime, np.random.default_rng(seed)

    def look_ahead(self) -> None:
        layer = self._random.choice(list(self._runtime.layers.values()))
        guesses = self._random.permutation(layer.experts)[: self._random.integers(0, 5)]
        self._runtime.stats.add(layer.pool.prefetch(layer.span, guesses + layer.first))

    def note(self, report: LoadReport) -> None:
        pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordStore]:
    yield build_store(tmp_path_factory.mktemp("store"), [(ODD, EXPERTS)] * LAYERS)


@settings(max_examples=120, deadline=None)
@given(
    slots=st.integers(TOP_K, LAYERS * EXPERTS),
    policy=st.sampled_from(POLICY_NAMES),
    rows=st.lists(st.sampled_from([1, 1, 1, 2, 3, 7, 40]), min_size=1, max_size=12),
    split_seconds=st.sampled_from([0.0, 1.0]),
    left_early=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_reports_add_up_to_what_cache_and_loader_did(
    made: RecordStore, slots: int, policy: str, rows: list[int], split_seconds: float, left_early: bool, seed: int
) -> None:
    runtime = runtime_of(made, {ODD: slots}, policy)
    runtime.prefetcher = Guesses(runtime, seed)  # type: ignore[assignment]
    (pool,) = runtime.pools
    assert isinstance(pool, LocalPool)
    audit, random = Audit(pool), np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime_module, "SPLIT_SECONDS", split_seconds)
        for count in rows:
            runtime.begin_step(Batch(count))
            for layer in runtime.layers.values():
                chosen = np.argsort(random.random((count, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
                waves = runtime.serve(layer, chosen)
                for _ in waves:
                    if left_early and random.random() < 0.1:
                        break
                waves.close()
                audit.check_totals(runtime.stats)
    assert runtime.stats.hits + runtime.stats.misses > 0
    runtime.close()


def test_counters_count_each_thing_a_report_says() -> None:
    report = LoadReport(
        hits=1, misses=2, streamed=3, loads=4, loaded_bytes=50, prefetched_bytes=15, streamed_bytes=5, failed=6,
        waited=7.0, demanded=8, demand_seconds=9.0, started=20, withdrawn=9, useful=12, late=13, wasted=14, evicted=16,
        late_seconds=15.0, host_hits=1, copied=2, copied_bytes=90, copied_prefetched_bytes=20, copied_streamed_bytes=7,
    )  # fmt: skip
    stats = Stats(hits=100)
    stats.add(report)
    stats.add(NOTHING)
    assert stats == Stats(
        hits=101, misses=2, streamed=3, loads=4, loaded_bytes=50, demanded_bytes=30, prefetched_bytes=15,
        streamed_bytes=5, failed_loads=6, stall_seconds=7.0, prefetches=20, prefetch_useful=12, prefetch_late=13,
        prefetch_wasted=14, prefetch_withdrawn=9, evictions=16, host_hits=1, copied_bytes=90, copied_demanded_bytes=63,
        copied_prefetched_bytes=20, copied_streamed_bytes=7,
    )  # fmt: skip


def test_reports_add_up_field_by_field() -> None:
    assert LoadReport(hits=1, waited=0.5) + LoadReport(hits=2, late=1) == LoadReport(hits=3, waited=0.5, late=1)
    assert NOTHING + NOTHING == NOTHING


def test_a_started_hold_is_reported_when_it_is_abandoned(tmp_path: Path) -> None:
    runtime = runtime_of(build_store(tmp_path, [(ODD, EXPERTS)]), {ODD: 4}, "lfu")
    (pool,) = runtime.pools
    hold, report = pool.start_hold(range(EXPERTS), np.array([1, 2]))
    assert (report.misses, report.loads) == (2, 0)
    report = pool.abandon(hold)
    assert (report.loads, report.demanded, report.loaded_bytes) == (2, 2, 2 * ODD.payload_bytes)
    assert report.demand_seconds > 0
    runtime.close()
