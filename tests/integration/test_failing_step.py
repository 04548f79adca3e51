"""From a record that cannot be read to the requests that needed it, for models that generate and models that pool."""

import mmap
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.runtime.record_stores import ODD, build_store
from vllm_moe_offload.integration.failure_board import FailureBoard, board_bytes
from vllm_moe_offload.integration.failures import StepFailures
from vllm_moe_offload.integration.report import ChunkReport
from vllm_moe_offload.integration.serving import ServedModel
from vllm_moe_offload.integration.step import _attach_failures, _run_step, _warm_up_apart
from vllm_moe_offload.integration.worker import WorkerOffload
from vllm_moe_offload.pool import local_pools
from vllm_moe_offload.runtime import OffloadRuntime
from vllm_moe_offload.stats import Stats

CHOSEN = np.array([[0, 1], [2, 3], [4, 5], [0, 2]], dtype=np.int32)
"""Of four rows, in the order of the batch: two of "b", one of "a", one of "c"."""
SCHEDULED = {"a": 1, "b": 2, "c": 1}


class Worker:
    """One whose forward pass routes ``CHOSEN`` to the only layer."""

    def __init__(self, folder: Path):
        self.made = build_store(folder, [(ODD, 8)])
        pools = local_pools(self.made.store, {ODD: 6}, "lfu", None)
        served = ServedModel.__new__(ServedModel)
        served.runtime = OffloadRuntime(self.made.store, pools, Stats())
        served._daemon = served._history = served._managed = served._step = None
        served.drafts = False
        served._chunks = ChunkReport(served.runtime.stats, most_tokens=8)
        self.served = served
        offload = WorkerOffload.__new__(WorkerOffload)
        offload._models = [served]
        offload.warms_up = offload._traces = False
        offload._failures = StepFailures(FailureBoard(mmap.mmap(-1, board_bytes(1, 8)), ranks=1, rank=0, requests=8))
        self.moe_offload = offload
        self.use_v2_model_runner = False
        self.model_runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["b", "a", "c"]))

    def compute(self) -> None:
        runtime = self.served.runtime
        (layer,) = runtime.layers.values()
        with closing(runtime.serve(layer, CHOSEN)) as waves:
            for _ in waves:
                pass
        if runtime.has_failures:
            self.served.report_failures()

    def run_step(self, pools: bool) -> dict[str, str]:
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

        def execute_model(worker: Worker, scheduler_output: Any) -> Any:
            worker.compute()
            return EMPTY_MODEL_RUNNER_OUTPUT if pools else None

        def sample_tokens(worker: Worker, grammar: Any) -> Any:
            return EMPTY_MODEL_RUNNER_OUTPUT

        step = SimpleNamespace(num_scheduled_tokens=SCHEDULED, total_num_scheduled_tokens=4, finished_req_ids=set())
        output = _run_step(execute_model)(self, step)
        if output is None:
            output = _attach_failures(sample_tokens)(self, None)
        return getattr(output, "moe_offload_failed", {})


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    made = Worker(tmp_path)
    monkeypatch.setattr(made.served, "_set_aside", lambda reason: None)
    return made


@pytest.mark.parametrize("pools", [False, True])
def test_the_requests_whose_rows_needed_the_record_fail(worker: Worker, pools: bool) -> None:
    worker.made.flip(0, 2)
    failed = worker.run_step(pools)
    assert sorted(failed) == ["b", "c"]
    assert all("expert 2 of layer 0 could not be read" in reason for reason in failed.values())
    worker.made.flip(0, 2)
    assert worker.run_step(pools) == {}


def test_where_vllm_does_not_say_whose_rows_they_are_all_fail(worker: Worker) -> None:
    worker.model_runner = SimpleNamespace()
    worker.made.flip(0, 5)
    assert sorted(worker.run_step(pools=False)) == sorted(SCHEDULED)


def test_what_fails_outside_of_a_step_fails_nobody(worker: Worker) -> None:
    """A warm-up pass before it, and whatever comes after it."""
    worker.made.flip(0, 2)
    worker.compute()
    worker.made.flip(0, 2)
    assert worker.run_step(pools=False) == {}
    worker.made.flip(0, 3)
    worker.compute()
    worker.made.flip(0, 3)
    assert worker.run_step(pools=False) == {}


def test_steps_that_warm_up_serve_nobody(worker: Worker) -> None:
    """They are scheduled like any other, of requests that the V2 model runner makes up."""
    failed = []
    worker.made.flip(0, 2)
    _warm_up_apart(lambda self: failed.append(self.run_step(pools=False)))(worker)
    assert failed == [{}]
    stats = worker.served.runtime.stats
    assert (stats.steps, stats.tokens) == (0, 0)
    assert sorted(worker.run_step(pools=False)) == ["b", "c"]
    assert stats.steps == 1
