"""Whatever is asked for in whatever order: every wave finds exactly its records in pinned slots, within the budget."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pool.test_loader import Reads
from tests.runtime.record_stores import MIXED, ODD, RecordStore, build_store, layout
from vllm_moe_offload.cache import POLICY_NAMES
from vllm_moe_offload.cache.cache import FREE
from vllm_moe_offload.errors import LoadError
from vllm_moe_offload.load_report import NOTHING, LoadReport
from vllm_moe_offload.pool import local_pools
from vllm_moe_offload.runtime import Batch, OffloadRuntime, PooledLayer, runtime
from vllm_moe_offload.stats import Stats
from vllm_moe_offload.store import RecordLayout, Store

SMALL = layout(4096, 100)
MODELS = {
    "alike": [(SMALL, 6)] * 4,
    "many experts": [(ODD, 24)] * 2,
    "two layouts": [(SMALL, 8), (MIXED, 5), (SMALL, 8), (SMALL, 3), (MIXED, 5)],
}


@pytest.fixture(autouse=True, params=[0.0, 1e9], ids=["rows split", "rows together"])
def split_seconds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Records of these tests load in no time: whether rows are computed while others load is decided here."""
    seconds: float = request.param
    monkeypatch.setattr(runtime, "SPLIT_SECONDS", seconds)
    return seconds


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RecordStore]:
    root = tmp_path_factory.mktemp("stores")
    return {name: build_store(root, layers, seed) for seed, (name, layers) in enumerate(MODELS.items())}


class Script(NamedTuple):
    """A model, slots for each of its layouts, and what is asked of them."""

    model: str
    slots: dict[RecordLayout, int]
    policy: str
    top_k: int
    elsewhere: float
    """Share of choices that are another worker's: -1."""
    rows: list[int]
    """Of each forward pass."""
    seed: int
    damaged: set[tuple[int, int]]
    """(layer, expert) of records that are wrong on disk for the first half of the passes."""

    def steps(self) -> list[list[np.ndarray]]:
        """What each row of each pass chooses in each layer."""
        random = np.random.default_rng(self.seed)
        return [[self._choose(random, rows, experts) for _, experts in MODELS[self.model]] for rows in self.rows]

    def _choose(self, random: np.random.Generator, rows: int, experts: int) -> np.ndarray:
        preferences = random.random((rows, experts)) * random.random(experts)
        chosen = np.argsort(preferences, axis=1)[:, : self.top_k]
        return np.where(random.random(chosen.shape) < self.elsewhere, -1, chosen).astype(np.int32)


@st.composite
def scripts(draw: st.DrawFn, damage: bool = False) -> Script:
    model = draw(st.sampled_from(sorted(MODELS)))
    layers = MODELS[model]
    top_k = draw(st.integers(1, min(experts for _, experts in layers)))
    totals: dict[RecordLayout, int] = {}
    for shape, experts in layers:
        totals[shape] = totals.get(shape, 0) + experts
    records = [(layer, expert) for layer, (_, experts) in enumerate(layers) for expert in range(experts)]
    return Script(
        model,
        slots={shape: draw(st.integers(top_k, total)) for shape, total in totals.items()},
        policy=draw(st.sampled_from(POLICY_NAMES)),
        top_k=top_k,
        elsewhere=draw(st.sampled_from([0.0, 0.0, 0.5])),
        rows=draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 40]), min_size=1, max_size=12)),
        seed=draw(st.integers(0, 2**32)),
        damaged=draw(st.sets(st.sampled_from(records), max_size=4)) if damage else set(),
    )


def runtime_of(made: RecordStore, slots: dict[RecordLayout, int], policy: str) -> OffloadRuntime:
    store = Store.open(made.store.path)
    return OffloadRuntime(store, local_pools(store, slots, policy, None), Stats())


class Checked:
    """A runtime that is looked at through every wave it yields."""

    def __init__(self, made: RecordStore, slots: dict[RecordLayout, int], policy: str):
        self.made = made
        self.slots = slots
        self.runtime = runtime_of(made, slots, policy)
        self.damaged: set[tuple[int, int]] = set()

    def step(self, chosen: list[np.ndarray]) -> None:
        self.runtime.begin_step(Batch(len(chosen[0])))
        for layer in sorted(self.runtime.layers.values(), key=lambda layer: layer.index):
            self.serve(layer, chosen[layer.index])

    def serve(self, layer: PooledLayer, chosen: np.ndarray) -> None:
        covered = np.zeros(len(chosen), dtype=int)
        for wave in self.runtime.serve(layer, chosen):
            rows = np.arange(len(chosen)) if wave.rows is None else wave.rows
            covered[rows] += 1
            assert wave.slots.shape == chosen[rows].shape
            self.check_wave(layer, chosen[rows], wave.slots)
            self.check_residency()
            self.check_wave(layer, chosen[rows], wave.slots)
        assert (covered == 1).all()
        self.check_residency()
        self.check_failures(layer, chosen)

    def check_wave(self, layer: PooledLayer, chosen: np.ndarray, slots: np.ndarray) -> None:
        assert ((slots < 0) == (chosen < 0)).all()
        for expert, slot in {*zip(chosen[chosen >= 0].tolist(), slots[chosen >= 0].tolist(), strict=True)}:
            assert layer.pool.cache.pins[slot] > 0 or slot in layer.pool.cache.found
            if (layer.index, expert) not in self.damaged:
                assert self.made.holds(layer.pool.memory, slot, layer.index, expert)

    def check_residency(self) -> None:
        assert len(self.runtime.pools) == len(self.slots)
        for pool in self.runtime.pools:
            pool.cache.check_integrity()
            assert len(pool.cache.pins) == pool.memory.slots == self.slots[pool.memory.layout]
            assert all(len(component) == pool.memory.slots for component in pool.memory.components)

    def check_failures(self, layer: PooledLayer, chosen: np.ndarray) -> None:
        failures, rows = self.runtime.take_failures()
        lost = {expert for index, expert in self.damaged if index == layer.index}
        asked = set(np.unique(chosen).tolist()) & lost
        assert rows == set(np.flatnonzero(np.isin(chosen, list(lost)).any(axis=1)).tolist())
        for expert in asked:
            assert any(f"expert {expert} of {layer.name} could not be read" in str(error) for error in failures)
        assert bool(failures) == bool(asked)
        assert all(isinstance(error, LoadError) for error in failures)

    def check_contents(self) -> None:
        """Nothing is under way or pinned, and every occupied slot has the record the cache says it has."""
        for layer in self.runtime.layers.values():
            if layer.experts <= layer.pool.memory.slots:
                self.serve(layer, np.arange(layer.experts, dtype=np.int32)[:, None])
        for pool in self.runtime.pools:
            assert not pool.cache.pins.any()
            owners = {layer.first + e: (layer, e) for layer in self.of(pool) for e in range(layer.experts)}
            for slot in np.flatnonzero(pool.cache.expert_of != FREE).tolist():
                layer, expert = owners[int(pool.cache.expert_of[slot])]
                assert self.made.holds(pool.memory, slot, layer.index, expert)

    def of(self, pool: object) -> list[PooledLayer]:
        return [layer for layer in self.runtime.layers.values() if layer.pool is pool]


@settings(max_examples=150, deadline=None)
@given(script=scripts())
def test_every_wave_finds_its_records(stores: dict[str, RecordStore], script: Script) -> None:
    checked = Checked(stores[script.model], script.slots, script.policy)
    for step in script.steps():
        checked.step(step)
    checked.check_contents()
    stats = checked.runtime.stats
    assert stats.failed_loads == 0 and stats.steps == np.count_nonzero(script.rows)
    checked.runtime.close()


@settings(max_examples=100, deadline=None)
@given(script=scripts())
def test_a_batch_reads_each_expert_it_lacks_once_and_nothing_else(
    stores: dict[str, RecordStore], script: Script
) -> None:
    checked = Checked(stores[script.model], script.slots, script.policy)
    loads = checked.runtime.stats.loads
    few_rows = [min(rows, 3) for rows in script.rows]  # of more, a layer is streamed: all of its experts are read
    for step in script._replace(rows=few_rows).steps():
        checked.runtime.begin_step(Batch(len(step[0])))
        for layer in checked.runtime.layers.values():
            chosen, cache = step[layer.index], layer.pool.cache
            needed = np.unique(chosen[chosen >= 0]) + layer.first
            lacking = np.count_nonzero(cache.slot_of[needed] < 0)
            checked.serve(layer, chosen)
            if len(needed) <= cache.num_slots:
                assert checked.runtime.stats.loads - loads == lacking
            loads = checked.runtime.stats.loads
    checked.runtime.close()


@settings(max_examples=150, deadline=None)
@given(script=scripts(damage=True))
def test_damaged_records_void_the_rows_that_need_them_and_nothing_else(
    stores: dict[str, RecordStore], script: Script
) -> None:
    made = stores[script.model]
    checked = Checked(made, script.slots, script.policy)
    half = len(script.rows) // 2
    try:
        for layer, expert in script.damaged:
            made.flip(layer, expert)
        checked.damaged = set(script.damaged)
        for step in script.steps()[:half]:
            checked.step(step)
    finally:
        for layer, expert in script.damaged:
            made.flip(layer, expert)
    settle(checked)
    checked.damaged = set()
    for step in script.steps()[half:]:
        checked.step(step)
    checked.check_contents()
    checked.runtime.close()


def settle(checked: Checked) -> None:
    """Loads that were started ahead may still have read the damaged bytes."""
    for pool in checked.runtime.pools:
        pool.loader.join([started.load for started in pool.in_flight.loads])


@pytest.mark.parametrize("model", MODELS)
def test_a_budget_for_everything_loads_every_expert_into_its_own_slot(
    stores: dict[str, RecordStore], model: str
) -> None:
    made = stores[model]
    slots = {shape: sum(e for other, e in MODELS[model] if other == shape) for shape, _ in MODELS[model]}
    runtime = runtime_of(made, slots, "lfu")
    runtime.load_everything()
    for layer in runtime.layers.values():
        assert all(made.holds(layer.pool.memory, layer.first + e, layer.index, e) for e in range(layer.experts))
    runtime.close()
    made.flip(1, 2)
    damaged = runtime_of(made, slots, "lfu")
    with pytest.raises(LoadError, match="expert 2 of layer 1 could not be read"):
        damaged.load_everything()
    damaged.close()
    made.flip(1, 2)


class Guesser:
    """In place of a prefetcher: has anything at all loaded, and adds up the reports of it."""

    def __init__(self, runtime: OffloadRuntime, seed: int):
        self.runtime = runtime
        self.draw = np.random.default_rng(seed)
        self.reports = NOTHING

    def look_ahead(self) -> None:
        layer = self.draw.choice(list(self.runtime.layers.values()))
        guesses = self.draw.permutation(layer.experts)[: self.draw.integers(1, 5)]
        report = layer.pool.prefetch(layer.span, guesses + layer.first)
        self.runtime.stats.add(report)
        self.note(report)

    def note(self, report: LoadReport) -> None:
        assert (report.demand_seconds > 0) == (report.demanded > 0)
        assert report.late or not report.late_seconds
        self.reports += report


@settings(max_examples=150, deadline=None)
@given(script=scripts(damage=True))
def test_speculative_loads_do_not_show_in_what_a_wave_finds(stores: dict[str, RecordStore], script: Script) -> None:
    made = stores[script.model]
    checked = Checked(made, script.slots, script.policy)
    guesser = Guesser(checked.runtime, script.seed)
    checked.runtime.prefetcher = guesser  # type: ignore[assignment]
    try:
        for layer, expert in script.damaged:
            made.flip(layer, expert)
        checked.damaged = set(script.damaged)
        for step in script.steps():
            checked.step(step)
        settle(checked)
    finally:
        for layer, expert in script.damaged:
            made.flip(layer, expert)
    stalled = checked.runtime.stats.stall_seconds
    assert guesser.reports.waited == pytest.approx(stalled), "every wait is told once, whoever began the load"
    stats = checked.runtime.stats
    told = (stats.prefetch_useful, stats.prefetch_late, stats.prefetch_wasted)
    assert told == (guesser.reports.useful, guesser.reports.late, guesser.reports.wasted)
    assert sum(told) <= stats.prefetches
    checked.runtime.prefetcher = None
    checked.damaged = set()
    checked.check_contents()
    checked.runtime.close()


@pytest.mark.parametrize("split_seconds", [0.0], indirect=True)
def test_rows_are_computed_while_the_experts_of_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_store(tmp_path, [(SMALL, 8)])
    checked = Checked(made, {SMALL: 7}, "lfu")
    (layer,) = checked.runtime.layers.values()
    checked.step([np.array([[0, 1]], dtype=np.int32)])
    reads = Reads(made, monkeypatch)
    reads.hold(2, 3, 4, 5)
    chosen = np.array([[4, 5], [0, 2], [1, 0], [3, 0]], dtype=np.int32)
    checked.runtime.begin_step(Batch(4))
    waves = iter(checked.runtime.serve(layer, chosen))
    rows = []
    for readable in ((), (2, 3), (4, 5)):
        for expert in readable:
            reads.may_go[expert].set()
        wave = next(waves)
        assert wave.rows is not None
        rows.append(wave.rows.tolist())
        checked.check_wave(layer, chosen[wave.rows], wave.slots)
    assert rows == [[2], [1, 3], [0]], "each before what it does not need could be read"
    assert next(waves, None) is None
    assert not layer.pool.cache.pins.any()
    checked.runtime.close()
