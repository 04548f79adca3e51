"""Pools whose keeper goes away in the middle of a step are exchanged, and the step ends as if they had stayed."""

from pathlib import Path

import numpy as np
import pytest

from tests.runtime.record_stores import RecordStore, build_store, layout
from vllm_moe_offload.cache import ExpertCache, create_policy
from vllm_moe_offload.load_report import LoadReport
from vllm_moe_offload.pool import HostMemory
from vllm_moe_offload.pool.base import HostPool, PoolGoneError, SlotPool
from vllm_moe_offload.pool.loader import RecordLoader
from vllm_moe_offload.pool.local import LocalPool
from vllm_moe_offload.pool.operations import Operations
from vllm_moe_offload.runtime import Batch, OffloadRuntime
from vllm_moe_offload.stats import Stats
from vllm_moe_offload.store import RecordLayout
from vllm_moe_offload.store.pools import PoolMembers

SMALL, LARGE = layout(4096), layout(8192)
EXPERTS = 12


class Keeper:
    """Pools in the same memory, one set after the other."""

    def __init__(self, built: RecordStore, slots: int):
        self.built = built
        self.slots = slots
        self.memory = {shape: HostMemory(shape, slots) for shape in (SMALL, LARGE)}
        self.reasons: list[str] = []
        self.comes_back = False
        self.pools = self._make()

    def _make(self) -> dict[str, HostPool]:
        operations = Operations(lambda: RecordLoader(self.built.store))
        pools: dict[RecordLayout, HostPool] = {}
        for shape, memory in self.memory.items():
            members = PoolMembers.of(self.built.store.layers, shape)
            cache = ExpertCache(members.layer_of, self.slots, create_policy("lfu", members.layer_of))
            pools[shape] = LocalPool(members, memory, cache, operations)
        return {entry.name: pools[entry.layout] for entry in self.built.store.layers}

    def begin_step(self) -> bool:
        if self.comes_back:
            self.pools = self._make()
        return self.comes_back

    def fail_over(self, reason: PoolGoneError) -> None:
        self.reasons.append(str(reason))
        for pool in self.pools.values():
            pool.close()
        self.pools = self._make()


@pytest.fixture
def built(tmp_path: Path) -> RecordStore:
    return build_store(tmp_path, [(SMALL, EXPERTS), (LARGE, EXPERTS), (SMALL, EXPERTS)])


@pytest.fixture
def keeper(built: RecordStore) -> Keeper:
    return Keeper(built, slots=8)


class Replacements:
    """A prefetcher, as far as it hears of pools that take the place of others."""

    def __init__(self) -> None:
        self.seen: list[tuple[SlotPool, SlotPool]] = []

    def replace_pool(self, old: SlotPool, new: SlotPool) -> None:
        self.seen.append((old, new))

    def note(self, report: LoadReport) -> None: ...
    def look_ahead(self) -> None: ...


def gone(*_: object) -> None:
    raise PoolGoneError("they are gone")


STEPS = {
    "hold": (np.array([[1, 4]]), 8),
    "hold_streaming": (np.tile(np.arange(8), (40, 1)), EXPERTS),
    "finish_hold": (np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]), 8),
}
"""How the experts of a layer are waited for: what its rows choose, and with how many slots."""


@pytest.mark.parametrize("verb", STEPS)
def test_a_layer_is_served_by_the_pools_that_come_after(
    built: RecordStore, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, slots_of_pool = STEPS[verb]
    keeper, stats = Keeper(built, slots_of_pool), Stats()
    runtime = OffloadRuntime(keeper.built.store, keeper.pools, stats, keeper)
    replacements = Replacements()
    runtime.prefetcher = replacements  # type: ignore[assignment]
    first = keeper.pools
    monkeypatch.setattr(first["layer 2"], verb, gone)
    layer = runtime.layers["layer 2"]
    runtime.begin_step(Batch(len(chosen)))
    rows: list[int] = []
    for wave in runtime.serve(layer, chosen):
        mine = np.arange(len(chosen)) if wave.rows is None else wave.rows
        for row, slots in zip(mine.tolist(), wave.slots, strict=True):
            for expert, slot in zip(chosen[row].tolist(), slots.tolist(), strict=True):
                assert keeper.built.holds(keeper.memory[SMALL], slot, 2, expert)
        rows += mine.tolist()
    assert sorted(rows) == list(range(len(chosen))) and not runtime.has_failures
    assert keeper.reasons == ["they are gone"], "all pools are exchanged at once, and once"
    assert runtime.pools == [keeper.pools["layer 0"], keeper.pools["layer 1"]]
    for name, each in runtime.layers.items():
        assert each.pool is keeper.pools[name] is not first[name]
    assert replacements.seen == [(first[name], keeper.pools[name]) for name in ("layer 0", "layer 1")]
    runtime.close()


def test_pools_that_nobody_can_replace_are_an_error(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = OffloadRuntime(keeper.built.store, keeper.pools, Stats())
    monkeypatch.setattr(keeper.pools["layer 0"], "hold", gone)
    with pytest.raises(PoolGoneError):
        next(iter(runtime.serve(runtime.layers["layer 0"], np.array([[1]]))))
    runtime.close()


def test_a_step_begins_with_the_pools_that_have_come_back(keeper: Keeper) -> None:
    runtime = OffloadRuntime(keeper.built.store, keeper.pools, Stats(), keeper)
    runtime.begin_step(Batch(1))
    first = runtime.pools
    keeper.comes_back = True
    runtime.begin_step(Batch(1))
    assert runtime.pools == [keeper.pools["layer 0"], keeper.pools["layer 1"]] != first
    runtime.close()


def test_pools_of_other_memory_are_refused(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = OffloadRuntime(keeper.built.store, keeper.pools, Stats(), keeper)
    monkeypatch.setattr(keeper.pools["layer 0"], "hold", gone)
    keeper.memory = {shape: HostMemory(shape, keeper.slots) for shape in (SMALL, LARGE)}
    with pytest.raises(AssertionError, match="the memory that they were given"):
        next(iter(runtime.serve(runtime.layers["layer 0"], np.array([[1]]))))
    runtime.close()
