"""One step after another: who is called when, with which rows, whatever was left out or left early."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.record_stores import ODD, build_store
from tests.runtime.test_runtime_serves import runtime_of
from vllm_moe_offload.runtime import Batch, OffloadRuntime
from vllm_moe_offload.trace.recorder import ScheduledTokens

CHOSEN = np.array([[0, 1], [2, 3], [9, 9]], np.int32)
WEIGHTS = np.array([[3.0, 1.0], [1.0, 1.0], [0.0, 0.0]], np.float32)
"""Of two rows and one of padding."""


class TwoTokens(Batch):
    def __init__(self, ended: Sequence[str] = ()):
        super().__init__(2, ended)

    def rows(self) -> list[ScheduledTokens]:
        return [ScheduledTokens("a", 5, np.array([7, 8], np.int32), 9)]


class Calls:
    """Notes what it is called with under its name; ``answers`` by method."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]], **answers: Any):
        self._name, self._calls, self._answers = name, calls, answers
        self.predicts = True
        self.embeddings: dict[str, Any] = {}

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any) -> Any:
            self._calls.append((f"{self._name}.{method}", *arguments))
            answer = self._answers.get(method)
            return answer(*arguments) if callable(answer) else answer

        return call


class Worker:
    def __init__(self, folder: Path):
        self.calls: list[tuple[Any, ...]] = []
        self.runtime: OffloadRuntime = runtime_of(build_store(folder, [(ODD, 8)]), {ODD: 4}, "lfu")
        (pool,) = self.runtime.pools
        begin = pool.begin_step

        def begin_step() -> Any:
            self.calls.append(("pool.begin_step",))
            return begin()

        pool.begin_step = begin_step  # type: ignore[method-assign]
        tracer = Calls("tracer", self.calls, begin_step=lambda batch: batch.rows(), end_step=["maps"])
        self.runtime.tracer = tracer  # type: ignore[assignment]
        self.runtime.prefetcher = Calls("prefetcher", self.calls, end_request="state")  # type: ignore[assignment]

    def take(self) -> list[str]:
        names = [call[0] for call in self.calls]
        self.calls.clear()
        return names


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    made = Worker(tmp_path)
    yield made
    made.runtime.close()


def test_a_step_from_its_batch_to_its_end(worker: Worker) -> None:
    runtime = worker.runtime
    runtime.begin_step(TwoTokens())
    worker.take()
    runtime.end_step()
    worker.take()
    runtime.begin_step(TwoTokens(ended=["b"]))
    assert worker.take() == ["tracer.end_step", "prefetcher.end_step", "prefetcher.end_request", "tracer.end_request",
                             "pool.begin_step", "prefetcher.note"]  # fmt: skip
    runtime.begin_pass()
    runtime.begin_pass()
    assert worker.take() == ["tracer.begin_step", "prefetcher.begin_step"]
    runtime.observe(0, CHOSEN, WEIGHTS)
    (_, layer, experts, weights), (_, layer_ahead, experts_ahead, shares) = worker.calls
    assert layer == layer_ahead == 0 and experts.tolist() == experts_ahead.tolist() == [[0, 1], [2, 3]]
    assert weights.tolist() == [[3.0, 1.0], [1.0, 1.0]] and shares.tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert worker.take() == ["tracer.observe", "prefetcher.observe"]
    runtime.end_step()
    assert worker.calls == [("tracer.end_step",), ("prefetcher.end_step", ["maps"])]
    assert (runtime.stats.steps, runtime.stats.tokens) == (2, 4)


def test_what_prediction_kept_of_a_request_goes_to_its_tracer(worker: Worker) -> None:
    worker.runtime.begin_step(Batch(0, ended=["a", "b"]))
    assert worker.calls[2:] == [
        ("prefetcher.end_request", "a"),
        ("tracer.end_request", "a", "state"),
        ("prefetcher.end_request", "b"),
        ("tracer.end_request", "b", "state"),
    ], "and nothing begins: the step has no tokens"
    assert worker.runtime.stats.steps == 0


def test_a_pass_whose_beginning_nobody_announces_begins_with_its_first_layer(worker: Worker) -> None:
    worker.runtime.begin_step(TwoTokens())
    worker.take()
    worker.runtime.observe(0, CHOSEN, WEIGHTS)
    assert worker.take() == ["tracer.begin_step", "prefetcher.begin_step", "tracer.observe", "prefetcher.observe"]


def test_passes_outside_of_a_step_and_of_unknown_rows_are_not_traced(worker: Worker) -> None:
    worker.runtime.begin_pass()
    worker.runtime.observe(0, CHOSEN, WEIGHTS)
    assert not worker.calls
    worker.runtime.begin_step(Batch(2))
    worker.take()
    worker.runtime.observe(0, CHOSEN, WEIGHTS)
    assert worker.take() == ["tracer.begin_step"]
    worker.runtime.begin_step(TwoTokens())
    worker.runtime.end_step()
    worker.take()
    worker.runtime.observe(0, CHOSEN, WEIGHTS)
    assert not worker.calls, "the step is over"


def test_a_pass_that_was_left_early_ends_when_the_next_step_begins(worker: Worker) -> None:
    worker.runtime.begin_step(TwoTokens())
    worker.runtime.observe(0, CHOSEN, WEIGHTS)
    worker.take()
    worker.runtime.begin_step(TwoTokens())
    assert worker.take() == ["tracer.end_step", "prefetcher.end_step", "pool.begin_step", "prefetcher.note"]
    worker.runtime.observe(0, CHOSEN, WEIGHTS)
    assert worker.take()[:2] == ["tracer.begin_step", "prefetcher.begin_step"]
