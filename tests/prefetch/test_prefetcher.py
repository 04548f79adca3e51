"""Prefetching, with a predictor that says what it is told and a clock that moves when told to."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_moe_offload.load_report import LoadReport
from vllm_moe_offload.predict.base import ModelShape, Predictor, Probabilities, Step, TokenContext
from vllm_moe_offload.prefetch.planner import Estimates
from vllm_moe_offload.prefetch.prefetcher import MOST_ROWS, Prefetcher, PrefetchLayer
from vllm_moe_offload.stats import Stats
from vllm_moe_offload.trace.recorder import Recorder, ScheduledTokens

SHAPE = ModelShape(4, 8, 2)


class Oracle(Predictor):
    """Says that every row will use experts ``2 * layer`` and ``2 * layer + 1``; notes what it is asked and told."""

    def __init__(self, sure: float = 1.0):
        super().__init__(SHAPE)
        self.sure = sure
        self.seen: list[list[TokenContext]] = []

    def begin(self, rows: Sequence[TokenContext]) -> Step:
        self.seen.append(list(rows))
        return OracleStep(self.sure, len(rows))


class OracleStep(Step):
    def __init__(self, sure: float, rows: int):
        self.sure, self.rows = sure, rows

    def observe(self, layer: int, experts: NDArray[np.integer], weights: NDArray[np.floating]) -> None:
        pass

    def predict(self, layer: int) -> Probabilities:
        probabilities = np.zeros((self.rows, SHAPE.experts), np.float32)
        probabilities[:, right(layer)] = self.sure
        return probabilities


class Slots:
    """Room for everything; remembers what was asked of it."""

    def __init__(self, clock: list[float], resident: Sequence[tuple[int, int]] = ()):
        self.clock = clock
        self.here = np.zeros((SHAPE.layers, SHAPE.experts), bool)
        for layer, expert in resident:
            self.here[layer, expert] = True
        self.started: list[tuple[int, int]] = []
        self.expected: dict[int, NDArray[np.float32]] = {}

    @property
    def layers(self) -> list[PrefetchLayer]:
        ids = [range(first, first + SHAPE.experts) for first in range(0, SHAPE.layers * SHAPE.experts, SHAPE.experts)]
        return [PrefetchLayer(self, span, None, SHAPE.experts) for span in ids]

    def enable_predictions(self) -> None:
        pass

    def absent(self, layer: range) -> NDArray[np.bool_]:
        return ~self.here[layer.start // SHAPE.experts]

    def expect(self, layer: range, probabilities: NDArray[np.float32] | float) -> None:
        number = layer.start // SHAPE.experts
        if isinstance(probabilities, float):
            assert probabilities == 0.0
            self.expected.pop(number, None)
        else:
            self.expected[number] = probabilities

    def prefetch(self, layer: range, experts: NDArray[np.int64]) -> LoadReport:
        assert all(expert in layer for expert in experts.tolist())
        self.here.ravel()[experts] = True
        self.started += [divmod(expert, SHAPE.experts) for expert in experts.tolist()]
        return LoadReport(started=len(experts))

    def queued(self) -> int:
        return 0


def right(layer: int) -> list[int]:
    return [2 * layer, 2 * layer + 1]


def estimates() -> Estimates:
    return Estimates(load_seconds=0.002, layer_seconds=0.003, chunk_seconds=0.002, busy=0.5)


def decode_row(request: str = "a", token: int = 5, position: int = 10) -> ScheduledTokens:
    return ScheduledTokens(request, position, np.array([token], np.int32), prompt=3)


def run_step(prefetcher: Prefetcher, recorder: Recorder, rows: list[ScheduledTokens], clock: list[float]) -> None:
    prefetcher.begin_step(rows, {})
    recorder.begin_step(rows)
    count = sum(len(part.tokens) for part in rows)
    for layer in range(SHAPE.layers):
        clock[0] += 0.003
        experts = np.tile(right(layer), (count, 1))
        weights = np.full((count, 2), 0.5, np.float32)
        recorder.note(layer, experts, weights)
        prefetcher.observe(layer, experts, weights)
        prefetcher.look_ahead()
    prefetcher.end_step(recorder.end_step())


def ready(oracle: Oracle, slots: Slots, clock: list[float]) -> Prefetcher:
    """One that has seen how long steps of one and two rows take, so that it predicts in the next."""
    prefetcher, recorder = Prefetcher(oracle, slots.layers, estimates(), lambda: clock[0], Stats()), Recorder(SHAPE)
    before = slots.here.copy()
    for position, rows in enumerate([1] * 4 + [2] * 4 + [1] * 8):
        parts = [decode_row(f"earlier {row}", token=90 + row, position=10 + position) for row in range(rows)]
        run_step(prefetcher, recorder, parts, clock)
    assert not slots.started and not oracle.seen
    assert (slots.here == before).all()
    return prefetcher


def test_what_is_certain_and_absent_is_loaded_before_its_layer_and_only_once() -> None:
    clock = [0.0]
    slots = Slots(clock, resident=[(2, 4)])
    prefetcher = ready(Oracle(), slots, clock)
    run_step(prefetcher, Recorder(SHAPE), [decode_row()], clock)
    wanted = {(layer, expert) for layer in range(SHAPE.layers) for expert in right(layer)} - {(2, 4)}
    assert sorted(slots.started) == sorted(wanted), "layer 0 from the step's start, the others as the layers pass"
    assert not slots.expected, "nothing is expected of a step that is over"


def test_what_is_improbable_is_left_alone() -> None:
    clock = [0.0]
    slots = Slots(clock)
    oracle = Oracle(sure=0.1)
    run_step(ready(oracle, slots, clock), Recorder(SHAPE), [decode_row()], clock)
    assert oracle.seen and not slots.started


def test_a_request_carries_its_past_from_step_to_step_and_is_forgotten_when_it_ends() -> None:
    clock, oracle, recorder = [0.0], Oracle(), Recorder(SHAPE)
    prefetcher = ready(oracle, Slots(clock), clock)
    run_step(prefetcher, recorder, [decode_row(token=5)], clock)
    run_step(prefetcher, recorder, [decode_row(token=6, position=11), decode_row("b", token=5)], clock)
    first, (second, other) = oracle.seen[0][0], oracle.seen[1]
    assert first.previous is None and first.same is None
    assert (second.token, second.previous_token) == (6, 5) and second.previous is not None
    assert second.previous.experts.tolist() == [right(layer) for layer in range(SHAPE.layers)]
    assert other.previous is None and other.same is not None, "the token's last map is shared, the past is not"
    assert prefetcher.end_request("a") is second.state and prefetcher.end_request("a") is None


def test_a_step_of_many_rows_is_not_predicted_but_remembered() -> None:
    clock, oracle, recorder = [0.0], Oracle(), Recorder(SHAPE)
    slots = Slots(clock)
    prefetcher = ready(oracle, slots, clock)
    tokens = np.arange(MOST_ROWS + 1, dtype=np.int32)
    run_step(prefetcher, recorder, [ScheduledTokens("a", 0, tokens, prompt=len(tokens))], clock)
    assert not oracle.seen and not slots.started
    run_step(prefetcher, recorder, [decode_row(token=0, position=len(tokens))], clock)
    assert oracle.seen[0][0].previous_token == MOST_ROWS and oracle.seen[0][0].same is not None


def test_loads_that_are_never_used_disable_it_and_it_tries_again() -> None:
    clock, oracle, recorder = [0.0], Oracle(), Recorder(SHAPE)
    slots = Slots(clock)
    prefetcher = Prefetcher(oracle, slots.layers, estimates(), lambda: clock[0], Stats())
    guessed = []
    for step in range(6000):
        run_step(prefetcher, recorder, [decode_row(position=10 + step)], clock)
        if slots.started:
            prefetcher.note(LoadReport(wasted=len(slots.started)))
        guessed.append(bool(slots.started))
        slots.here[:] = False
        slots.started.clear()
    assert all(guessed[12:20]), "it is given a chance"
    assert sum(guessed) < 0.2 * len(guessed), "which is not abused"
    assert any(guessed[-5000:]), "nor the last"


class Machine(Slots):
    """A simulated link and clock. Every step starts with the ``missing`` experts of each layer gone."""

    def __init__(self, clock: list[float], load_seconds: float, missing: Sequence[int]):
        super().__init__(clock)
        self.load_seconds, self.missing = load_seconds, list(missing)
        self.free_at = 0.0
        self.arrives: dict[tuple[int, int], float] = {}
        self.prefetcher: Prefetcher | None = None

    def next_step(self) -> None:
        if self.arrives and self.prefetcher is not None:
            self.prefetcher.note(LoadReport(wasted=len(self.arrives)))
        self.arrives.clear()
        self.here[:] = True
        self.here[:, self.missing] = False

    def prefetch(self, layer: range, experts: NDArray[np.int64]) -> LoadReport:
        for expert in experts.tolist():
            self.free_at = max(self.clock[0], self.free_at) + self.load_seconds
            self.arrives[divmod(expert, SHAPE.experts)] = self.free_at
        return super().prefetch(layer, experts)

    def queued(self) -> int:
        return sum(at > self.clock[0] for at in self.arrives.values())

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """Wait until ``experts`` are there: first for those under way, then for what has to be demanded."""
        guessed = [self.arrives.pop((layer, e)) for e in experts if (layer, e) in self.arrives]
        late = [at for at in guessed if at > self.clock[0]]
        waited = max([at - self.clock[0] for at in late], default=0.0)
        self.clock[0] += waited
        if self.prefetcher is not None and guessed:
            useful = len(guessed) - len(late)
            self.prefetcher.note(LoadReport(waited=waited, useful=useful, late=len(late), late_seconds=waited))
        absent = [e for e in experts if not self.here[layer, e]]
        if absent:
            self.free_at = max(self.clock[0], self.free_at) + len(absent) * self.load_seconds
            stalled, self.clock[0] = self.free_at - self.clock[0], self.free_at
            self.here[layer, absent] = True
            if self.prefetcher is not None:
                self.prefetcher.note(LoadReport(waited=stalled, demanded=len(absent), demand_seconds=stalled))


def seconds_of_run(
    predicts: bool, steps: int, rows: int, load: float, missing: Sequence[int], layer: float, sure: float, used: float
) -> float:
    """A run in which each of the two experts an oracle is ``sure`` of is used with probability ``used``."""
    clock, recorder, draw = [0.0], Recorder(SHAPE), np.random.default_rng(0)
    machine = Machine(clock, load, missing)

    def ticking() -> float:
        clock[0] += 0.02 * layer
        return clock[0]

    if predicts:
        begin = Estimates(load_seconds=max(load, 1e-6), layer_seconds=layer, chunk_seconds=max(load, 1e-6))
        machine.prefetcher = Prefetcher(Oracle(sure), machine.layers, begin, ticking, Stats())
    prefetcher = machine.prefetcher
    for step in range(steps):
        machine.next_step()
        parts = [decode_row(str(row), token=row, position=10 + step) for row in range(rows)]
        recorder.begin_step(parts)
        if prefetcher is not None:
            prefetcher.begin_step(parts, {})
        for number in range(SHAPE.layers):
            clock[0] += layer * (1 + 0.05 * rows)
            chosen = [e if draw.random() < used else (e + 3) % SHAPE.experts for e in right(number)]
            experts, weights = np.tile(chosen, (rows, 1)), np.full((rows, 2), 0.5, np.float32)
            recorder.note(number, experts, weights)
            if prefetcher is not None:
                prefetcher.observe(number, experts, weights)
            machine.use(number, sorted(set(chosen)))
            if prefetcher is not None:
                prefetcher.look_ahead()
        maps = recorder.end_step()
        if prefetcher is not None:
            prefetcher.end_step(maps)
    return clock[0]


ALL = range(SHAPE.experts)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    ("load", "missing", "layer", "sure", "used"),
    [
        pytest.param(0.002, [], 0.003, 0.9, 0.9, id="nothing is missing"),
        pytest.param(0.002, [7], 0.003, 0.9, 0.9, id="hardly anything is missing"),
        pytest.param(0.0, ALL, 0.003, 0.9, 0.9, id="loads take no time"),
        pytest.param(0.05, ALL, 0.001, 0.9, 0.9, id="the link is saturated"),
        pytest.param(0.05, ALL, 0.001, 0.9, 0.3, id="the link is saturated and guesses are wrong"),
        pytest.param(0.002, ALL, 0.003, 0.9, 0.1, id="guesses are wrong"),
        pytest.param(0.002, ALL, 0.003, 0.0, 0.9, id="nothing is foreseen"),
    ],
)
def test_in_the_long_run_it_costs_two_percent_at_most(
    rows: int, load: float, missing: Sequence[int], layer: float, sure: float, used: float
) -> None:
    on, off = (seconds_of_run(predicts, 1200, rows, load, missing, layer, sure, used) for predicts in (True, False))
    assert on <= 1.02 * off


def test_it_pays_where_loads_fit_between_layers() -> None:
    on, off = (seconds_of_run(predicts, 600, 1, 0.0012, ALL, 0.003, 0.95, 0.95) for predicts in (True, False))
    assert on < 0.85 * off


@settings(max_examples=60, deadline=None)
@given(held=st.sets(st.integers(0, 7), min_size=1), seed=st.integers(0, 99))
def test_a_layer_of_which_a_worker_holds_some_experts_is_addressed_by_the_numbers_of_the_model(
    held: set[int], seed: int
) -> None:
    """Expert ``held[i]`` of the model is the flat id ``16 + i`` of the pool."""
    draw = np.random.default_rng(seed)
    numbers = np.array(sorted(held))
    absent, probabilities = draw.random(len(held)) < 0.5, draw.random(SHAPE.experts).astype(np.float32)
    asked: dict[str, NDArray[np.generic]] = {}

    class Part(Slots):
        def absent(self, layer: range) -> NDArray[np.bool_]:
            assert layer == ids
            return absent

        def expect(self, layer: range, probabilities: NDArray[np.float32] | float) -> None:
            asked["expect"] = np.asarray(probabilities)

        def prefetch(self, layer: range, experts: NDArray[np.int64]) -> LoadReport:
            asked["prefetch"] = experts
            return LoadReport(started=len(experts))

    ids = range(16, 16 + len(held))
    layer = PrefetchLayer(Part([0.0]), ids, numbers, SHAPE.experts)
    assert np.flatnonzero(layer.absent()).tolist() == numbers[absent].tolist()
    layer.expect(probabilities)
    assert asked["expect"].tolist() == probabilities[numbers].tolist()
    wanted = draw.permutation(numbers)
    assert layer.prefetch(wanted).started == len(held)
    assert [int(numbers[flat - 16]) for flat in asked["prefetch"]] == wanted.tolist()


def test_another_pool_takes_the_place_of_one_in_all_its_layers() -> None:
    clock = [0.0]

    class Predicted(Slots):
        enabled = False

        def enable_predictions(self) -> None:
            self.enabled = True

    old, new = Predicted(clock), Predicted(clock)
    prefetcher = ready(Oracle(), old, clock)
    assert old.enabled and not new.enabled
    prefetcher.replace_pool(old, new)
    assert new.enabled
    run_step(prefetcher, Recorder(SHAPE), [decode_row()], clock)
    assert new.started and not old.started
