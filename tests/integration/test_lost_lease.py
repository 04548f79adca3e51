"""Layers that compute on leased experts look nothing up: a lease that is lost fails every request of the step."""

from types import SimpleNamespace

import pytest

from vllm_moe_offload.integration.serving import ServedModel


@pytest.mark.parametrize("lost", [True, False])
def test_a_lease_lost_within_a_step_fails_its_requests(lost: bool) -> None:
    served = ServedModel.__new__(ServedModel)
    served.runtime = SimpleNamespace(take_failures=lambda: ([], set()))  # type: ignore[assignment]
    served._daemon = SimpleNamespace(lease_lost=lost)  # type: ignore[assignment]
    served._vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=1))
    served._step_requests = {"a": 1, "b": 3}
    served.drafts = False
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["b", "a"]))
    failed = served.failed_requests(runner)
    assert sorted(failed) == (["a", "b"] if lost else [])
    assert all("took back its slots" in reason for reason in failed.values())
