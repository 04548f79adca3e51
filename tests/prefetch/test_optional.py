"""Prediction that raises, anywhere and anyhow, is switched off; steps go on as if it were not there."""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.prefetch.test_prefetcher import SHAPE, Oracle, OracleStep, Slots, decode_row, estimates
from tests.runtime.record_stores import ODD, RecordStore, build_store
from tests.runtime.test_runtime_serves import runtime_of
from vllm_moe_offload.load_report import LoadReport
from vllm_moe_offload.predict.base import Probabilities, RequestState, Step, TokenContext
from vllm_moe_offload.prefetch.optional import Switch
from vllm_moe_offload.prefetch.prefetcher import Prefetcher
from vllm_moe_offload.runtime import Batch, RoutingTracer
from vllm_moe_offload.stats import Stats
from vllm_moe_offload.trace.recorder import Recorder, ScheduledTokens
from vllm_moe_offload.trace.trace import Trace

Failing = Callable[[str], None]
CALLS = ("predictor.start_request", "predictor.begin", "step.observe", "step.predict")
CALLS += ("absent", "expect", "prefetch", "queued", "clock")
TRACED = ("batch.rows", "batch.prompt", "embed", "recorder.note", "recorder.end_step")


class Raising(Oracle):
    def __init__(self, enter: Failing):
        super().__init__()
        self.enter = enter

    def start_request(self, embedding: Any = None) -> RequestState:
        self.enter("predictor.start_request")
        return super().start_request(embedding)

    def begin(self, rows: Sequence[TokenContext]) -> Step:
        self.enter("predictor.begin")
        return RaisingStep(self.enter, len(rows))


class RaisingStep(OracleStep):
    def __init__(self, enter: Failing, rows: int):
        super().__init__(1.0, rows)
        self.enter = enter

    def observe(self, layer: int, experts: NDArray[np.integer], weights: NDArray[np.floating]) -> None:
        self.enter("step.observe")

    def predict(self, layer: int) -> Probabilities:
        self.enter("step.predict")
        return super().predict(layer)


class RaisingSlots(Slots):
    """A pool every method of which enters before it answers."""

    def __init__(self, clock: list[float], enter: Failing):
        super().__init__(clock)
        for name in ("absent", "expect", "prefetch", "queued"):
            setattr(self, name, self._entering(name, getattr(self, name), enter))

    @staticmethod
    def _entering(name: str, answer: Callable[..., Any], enter: Failing) -> Callable[..., Any]:
        def entered(*arguments: Any) -> Any:
            enter(name)
            return answer(*arguments)

        return entered


class OneToken(Batch):
    def __init__(self, enter: Failing, position: int):
        super().__init__(tokens=1)
        self.enter, self.position = enter, position

    def rows(self) -> Sequence[ScheduledTokens]:
        self.enter("batch.rows")
        return [decode_row(position=self.position)]

    def prompt(self, request: str) -> NDArray[np.int32]:
        self.enter("batch.prompt")
        return np.arange(3, dtype=np.int32)


class RaisingRecorder(Recorder):
    def __init__(self, enter: Failing):
        super().__init__(SHAPE)
        self.enter = enter

    def note(self, layer: int, experts: NDArray[np.integer], weights: NDArray[np.floating]) -> None:
        self.enter("recorder.note")
        super().note(layer, experts, weights)

    def end_step(self) -> Any:
        self.enter("recorder.end_step")
        return super().end_step()


class Worker:
    """A worker whose prediction enters every call it makes, of which one may raise. It offloads ``made``."""

    def __init__(self, made: RecordStore, where: str, left: int, error: type[BaseException]):
        self.where, self.left, self.error = where, left, error
        self.reports: list[str] = []
        self.traces: list[Trace] = []
        self.now = [0.0]
        self.slots = RaisingSlots(self.now, self.enter)
        self.prefetcher = Prefetcher(
            Raising(self.enter), self.slots.layers, estimates(), self.clock, Stats(), Switch(self.reports.append)
        )
        governor = self.prefetcher._governor
        governor.begin_step = lambda *_: True  # type: ignore[method-assign]  # whether it pays is not asked
        self.tracer = RoutingTracer(
            RaisingRecorder(self.enter),
            lambda trace, state: self.traces.append(trace),
            self.embed,
            switch=Switch(self.reports.append),
        )
        self.runtime = runtime_of(made, {ODD: SHAPE.layers * SHAPE.experts}, "lfu")
        self.runtime.tracer, self.runtime.prefetcher = self.tracer, self.prefetcher

    def enter(self, where: str) -> None:
        if where == self.where:
            self.left -= 1
            if self.left == 0:
                raise self.error("on purpose")

    def clock(self) -> float:
        self.enter("clock")
        self.now[0] += 1e-5
        return self.now[0]

    def embed(self, tokens: NDArray[np.integer]) -> NDArray[np.float32]:
        self.enter("embed")
        return np.ones((len(tokens), 4), np.float32)

    def run(self, steps: int) -> None:
        for position in range(10, 10 + steps):
            self.runtime.begin_step(OneToken(self.enter, position))
            for layer in range(SHAPE.layers):
                self.runtime.observe(layer, np.array([[0, 1]], np.int32), np.full((1, 2), 0.5, np.float32))
                self.prefetcher.note(LoadReport(waited=1e-3, demanded=1, demand_seconds=1e-3))
                self.prefetcher.look_ahead()
                self.prefetcher.note(LoadReport(useful=1))
            self.runtime.end_step()
        self.runtime.end_requests(["a"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RecordStore:
    return build_store(tmp_path_factory.mktemp("store"), [(ODD, SHAPE.experts)] * SHAPE.layers)


@settings(max_examples=80, deadline=None)
@given(
    where=st.sampled_from(CALLS + TRACED),
    nth=st.integers(1, 6),
    error=st.sampled_from([ValueError, IndexError, AssertionError, MemoryError, np.linalg.LinAlgError]),
)
def test_whatever_raises_first_is_reported_once_and_called_no_more(
    made: RecordStore, where: str, nth: int, error: type[Exception]
) -> None:
    worker = Worker(made, where, nth, error)
    with closing(worker.runtime):
        worker.run(steps=8)
    raised = worker.left <= 0
    assert len(worker.reports) == raised
    assert all(report.startswith(f"{error.__name__}: on purpose (test_optional.py:") for report in worker.reports)
    assert worker.left in (0, *range(1, 7)), "it was called again after it had raised"
    assert worker.prefetcher.switch.off == (raised and where in CALLS)
    assert worker.tracer.switch.off == (raised and where in TRACED)
    if where in CALLS:
        (trace,) = worker.traces
        assert trace.num_tokens == 8, "what was routed is recorded whether or not prediction lives"


@pytest.mark.parametrize("where", CALLS + TRACED)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_meant_to_end_the_engine_ends_it(made: RecordStore, where: str, error: type[BaseException]) -> None:
    worker = Worker(made, where, 1, error)
    with closing(worker.runtime), pytest.raises(error):
        worker.run(steps=8)


def test_rows_that_are_missing(made: RecordStore) -> None:
    worker = Worker(made, "nowhere", 0, ValueError)
    with closing(worker.runtime):
        worker.run(steps=2)
        worker.runtime.begin_step(OneToken(worker.enter, 20))
        worker.runtime.observe(0, np.empty((0, 2), np.int32), np.empty((0, 2), np.float32))
    assert len(worker.reports) == 1 and worker.tracer.switch.off
