"""Routing that comes late makes the traces of routing that comes in time, whatever ends or is left out meanwhile."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_moe_offload.predict.base import RequestState
from vllm_moe_offload.report.activity import Activity, EndedStep, LayerIds
from vllm_moe_offload.runtime import Batch, RoutingQueue, RoutingTracer
from vllm_moe_offload.stats import Stats
from vllm_moe_offload.trace.recorder import Recorder, RequestMaps, ScheduledTokens
from vllm_moe_offload.trace.trace import Trace

LAYERS, EXPERTS, TOP_K = 2, 8, 2
PROMPT = 3
LAYER_IDS = [LayerIds(f"layer {number}", EXPERTS * number, EXPERTS) for number in range(LAYERS)]


class LateTokens(Batch):
    """Tokens are where the host can read them from ``wait_for_tokens`` on."""

    def __init__(self, parts: Sequence[tuple[str, int, int]], ended: Sequence[str] = ()):
        super().__init__(sum(count for _, _, count in parts), ended, {request: count for request, _, count in parts})
        self._tokens = [np.full(count, -7, np.int32) for _, _, count in parts]
        self._parts = parts

    def rows(self) -> list[ScheduledTokens]:
        return [
            ScheduledTokens(request, position, tokens, PROMPT)
            for (request, position, _), tokens in zip(self._parts, self._tokens, strict=True)
        ]

    def wait_for_tokens(self) -> None:
        for (_, position, count), tokens in zip(self._parts, self._tokens, strict=True):
            tokens[:] = 100 + np.arange(position, position + count)

    def prompt(self, request: str) -> NDArray[np.int32]:
        return np.full(PROMPT, ord(request), np.int32)


@dataclass
class Step:
    """One that the engine schedules; ``experts``: None where it is left early."""

    batch: LateTokens
    experts: NDArray[np.int64] | None
    weights: NDArray[np.float32]
    lag: int
    """Steps after which its routing comes."""


@st.composite
def steps(draw: st.DrawFn) -> list[Step]:
    """Requests that begin, run in chunks, are preempted, end at any time; steps without rows, and steps left early."""
    seed = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    positions: dict[str, int] = {}
    fresh, scheduled = iter("abcdefghijkl"), []
    for _ in range(draw(st.integers(1, 12))):
        ended = [request for request in positions if seed.random() < 0.2]
        for request in ended:
            del positions[request]
        while len(positions) < 3 and seed.random() < 0.4:
            positions[next(fresh)] = 0
        parts = []
        for request in positions:
            if seed.random() < 0.1:
                positions[request] = 0  # preempted
            count = int(seed.integers(1, 4)) if positions[request] < PROMPT else 1
            parts.append((request, positions[request], count))
            positions[request] += count
        batch = LateTokens(parts, ended)
        shape = LAYERS, batch.tokens, TOP_K
        experts = np.array([seed.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS * batch.tokens)]).reshape(shape)
        weights = seed.random(shape, np.float32)
        if seed.random() < 0.1:
            weights[0, :1] = np.nan
        scheduled.append(Step(batch, None if seed.random() < 0.15 else experts, weights, int(seed.integers(0, 3))))
    return scheduled


Kept = list[tuple[Trace, RequestState | None]]


def tracer_of(kept: Kept) -> RoutingTracer:
    recorder = Recorder((LAYERS, EXPERTS, TOP_K))
    return RoutingTracer(recorder, lambda trace, state: kept.append((trace, state)), lambda prompt: prompt[:2] * 1.0)


def traced_in_time(scheduled: list[Step]) -> Kept:
    kept: Kept = []
    tracer = tracer_of(kept)
    for step in scheduled:
        for request in step.batch.ended:
            tracer.end_request(request, None)
        if not step.batch.tokens:
            continue
        tracer.begin_step(step.batch)
        step.batch.wait_for_tokens()
        if step.experts is not None:
            for layer in range(LAYERS):
                tracer.observe(layer, step.experts[layer], step.weights[layer])
        tracer.end_step()
    for request in tracer.running:
        tracer.end_request(request, None)
    return kept


class Served(NamedTuple):
    number: int
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    used: NDArray[np.int64]
    misses: NDArray[np.int64]


def served(number: int, step: Step) -> Served:
    assert step.experts is not None
    used = np.array([len(np.unique(layer)) for layer in step.experts])
    return Served(number, step.experts, step.weights, used, np.minimum(used, 1))


def traced_late(scheduled: list[Step], consumer: Any = None, activity: Activity | None = None) -> Kept:
    kept: Kept = []
    queue = RoutingQueue(activity or Activity(Stats(), LAYER_IDS))
    queue.tracer, queue.consumer = tracer_of(kept), consumer
    under_way: deque[tuple[int, int, Step]] = deque()
    for now, step in enumerate(scheduled, start=1):
        queue.end_requests(step.batch.ended)
        if step.batch.tokens:
            queue.add(now, step.batch)
            under_way.append((now, now + step.lag, step))
        while under_way and under_way[0][1] <= now:
            number, _, routed = under_way.popleft()
            if routed.experts is not None:
                queue.end_step(served(number, routed), routed.experts)
    for number, _, routed in under_way:
        if routed.experts is not None:
            queue.end_step(served(number, routed), routed.experts)
    queue.close()
    return kept


def as_lists(kept: Kept) -> list[list[Any]]:
    parts = [(t.tokens, t.experts, t.weights, t.phase, t.embeddings) for t, _ in kept]
    return [[None if part is None else part.tolist() for part in trace] for trace in parts]


@given(steps())
def test_the_traces_are_those_of_routing_in_time(scheduled: list[Step]) -> None:
    assert as_lists(traced_late(scheduled)) == as_lists(traced_in_time(scheduled))


class Consumer:
    """Notes the tokens that it has seen of each running request, and gives them as its state."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {}

    def end_step(self, maps: Sequence[RequestMaps]) -> None:
        for part in maps:
            self.seen.setdefault(part.rows.request, []).extend(part.tokens.tolist())

    def end_request(self, request: str) -> Any:
        return self.seen.pop(request, None)


@given(steps())
def test_who_is_told_of_maps_has_seen_all_of_a_request_when_it_ends(scheduled: list[Step]) -> None:
    consumer = Consumer()
    for trace, state in traced_late(scheduled, consumer):
        assert trace.tokens is not None and trace.tokens.tolist() == state
    assert not consumer.seen


@given(steps())
def test_activity_is_told_of_a_request_s_steps_before_its_end(scheduled: list[Step]) -> None:
    activity = Activity(Stats(), LAYER_IDS)
    traced_late(scheduled, activity=activity)
    expected: list[Any] = []
    for number, step in enumerate(scheduled):
        if step.batch.ended:
            expected.append(step.batch.ended)
        if step.batch.tokens and step.experts is not None:
            known = served(number, step)
            expected.append(EndedStep(step.batch.scheduled, known.used.sum(), known.misses.sum(), 0.0))
    said = activity.take_steps()
    assert said[: len(expected)] == expected
    assert not any(isinstance(entry, EndedStep) for entry in said[len(expected) :]), "requests that end with the engine"
