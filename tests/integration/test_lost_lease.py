"""Layers that compute on leased experts look nothing up: a lease that is lost fails every request of the step."""

import mmap
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_moe_offload.integration.batch import V1Batch
from vllm_moe_offload.integration.failure_board import FailureBoard, board_bytes
from vllm_moe_offload.integration.failures import StepFailures
from vllm_moe_offload.integration.report import ChunkReport
from vllm_moe_offload.integration.serving import ServedModel
from vllm_moe_offload.stats import Stats


@pytest.mark.parametrize("lost", [True, False])
def test_a_lease_lost_within_a_step_fails_its_requests(lost: bool) -> None:
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    failures = StepFailures(FailureBoard(mmap.mmap(-1, board_bytes(1, 4)), ranks=1, rank=0, requests=4))
    scheduled = {"a": 1, "b": 3}
    failures.begin_step(scheduled)
    served = ServedModel.__new__(ServedModel)
    served._daemon = SimpleNamespace(lease_lost=lost)  # type: ignore[assignment]
    served._history = served._managed = None
    served.drafts = False
    served._chunks = ChunkReport(Stats(), most_tokens=8)
    served.runtime = SimpleNamespace(end_step=lambda: None)  # type: ignore[assignment]
    scheduler_output = SimpleNamespace(
        num_scheduled_tokens=scheduled, total_num_scheduled_tokens=4, finished_req_ids=set()
    )
    served._step = V1Batch(SimpleNamespace(), scheduler_output), failures
    served.end_step()
    output: Any = failures.attach(EMPTY_MODEL_RUNNER_OUTPUT)
    failed: dict[str, str] = getattr(output, "moe_offload_failed", {})
    assert sorted(failed) == (["a", "b"] if lost else [])
    assert all("took back its slots" in reason for reason in failed.values())
