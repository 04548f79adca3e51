"""vLLM's own scheduler, with steps in flight when one turns out to have failed: no void block is ever found again."""

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest

BLOCK = 16
NUM_BLOCKS = 64


class Engine:
    """The scheduler of an engine whose steps the test ends when it likes, with whatever outputs it likes."""

    def __init__(self, model: Path, asynchronous: bool, num_blocks: int = NUM_BLOCKS):
        import torch
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        load_general_plugins()
        config = EngineArgs(
            str(model),
            block_size=BLOCK,
            max_num_batched_tokens=4 * BLOCK,
            max_num_seqs=4,
            enable_prefix_caching=True,
            additional_config={"moe_offload": {"cache": "25%"}},
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = num_blocks
        config.scheduler_config.async_scheduling = asynchronous
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        from vllm.utils.hashing import sha256

        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler = (AsyncScheduler if asynchronous else Scheduler)(
            config,
            KVCacheConfig(num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]),
            StructuredOutputManager(config),
            BLOCK,
        )

    def add(self, request_id: str, prompt: list[int]) -> Any:
        request = self._request(request_id, prompt)
        self.scheduler.add_request(request)
        return request

    def _request(self, request_id: str, prompt: list[int]) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        sampling = SamplingParams(max_tokens=50, ignore_eos=True)
        return Request(request_id, list(prompt), sampling, None, block_hasher=self._hasher)

    def end(self, step: Any, failed: dict[str, str] | None = None) -> dict[str, str]:
        """End ``step``; the reasons of the requests that got an error."""
        from vllm.v1.outputs import ModelRunnerOutput

        ids = list(step.num_scheduled_tokens)
        tokens = [[7] if self._generates(request_id) else [] for request_id in ids]
        output = copy(ModelRunnerOutput(ids, {request_id: i for i, request_id in enumerate(ids)}, tokens))
        if failed:
            output.moe_offload_failed = failed
        answered = self.scheduler.update_from_output(step, output)
        every = [one for outputs in answered.values() for one in outputs.outputs]
        return {one.request_id: one.stop_reason for one in every if str(one.finish_reason) == "error"}

    def _generates(self, request_id: str) -> bool:
        request = self.scheduler.requests.get(request_id)
        return request is not None and request.num_computed_tokens >= request.num_prompt_tokens

    def found(self, prompt: list[int]) -> int:
        """Tokens of ``prompt`` that the prefix cache would give to a request that comes now."""
        return self.scheduler.kv_cache_manager.get_computed_blocks(self._request("newcomer", prompt))[1]


@pytest.fixture
def engine(tiny_moe: Path) -> Callable[..., Engine]:
    return lambda asynchronous=False, **options: Engine(tiny_moe, asynchronous, **options)


PROMPT = list(range(1, 8 * BLOCK + 1))
"""Two steps long."""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_next_chunk_is_in_flight_when_a_chunk_fails(engine: Callable[..., Engine], asynchronous: bool) -> None:
    """As with asynchronous scheduling and with pipeline stages."""
    running = engine(asynchronous)
    running.add("first", PROMPT)
    before = running.scheduler.schedule()
    after = running.scheduler.schedule()
    assert before.num_scheduled_tokens == after.num_scheduled_tokens == {"first": 4 * BLOCK}
    assert running.found(PROMPT) > 0
    assert running.end(before, {"first": "gone"}) == {"first": "gone"}
    assert running.found(PROMPT) == 0
    assert running.end(after) == {}
    assert running.found(PROMPT) == 0 and not running.scheduler.requests


def test_what_was_computed_before_the_failed_step_stays(engine: Callable[..., Engine]) -> None:
    running = engine()
    running.add("first", PROMPT)
    before, after = running.scheduler.schedule(), running.scheduler.schedule()
    assert running.end(before) == {}
    assert running.end(after, {"first": "gone"}) == {"first": "gone"}
    assert running.found(PROMPT) == 4 * BLOCK


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_request_that_took_over_blocks_of_a_step_in_flight_fails_with_it(
    engine: Callable[..., Engine], asynchronous: bool
) -> None:
    running = engine(asynchronous)
    running.add("first", PROMPT[: 4 * BLOCK])
    before = running.scheduler.schedule()
    running.add("shares", [*PROMPT[: 3 * BLOCK], 999])
    running.add("apart", [999, *PROMPT[: 2 * BLOCK]])
    after = running.scheduler.schedule()
    assert after.num_scheduled_tokens["shares"] == 1
    assert running.end(before, {"first": "gone"}) == {"first": "gone", "shares": "gone"}
    assert running.end(after) == {}
    assert running.found(PROMPT) == 0
    assert list(running.scheduler.requests) == ["apart"]


def test_a_request_that_is_aborted_while_its_step_fails(engine: Callable[..., Engine]) -> None:
    """Its blocks went back before anybody knew that they are void."""
    from vllm.v1.request import RequestStatus

    running = engine()
    running.add("leaves", PROMPT[: 3 * BLOCK])
    running.add("shares", [*PROMPT[: 2 * BLOCK], 999])
    step = running.scheduler.schedule()
    assert set(step.num_scheduled_tokens) == {"leaves", "shares"}
    running.scheduler.finish_requests("leaves", RequestStatus.FINISHED_ABORTED)
    assert running.end(step, {"leaves": "gone"}) == {"shares": "gone"}
    assert running.found(PROMPT) == 0


def test_a_request_that_is_preempted_while_its_step_fails(engine: Callable[..., Engine]) -> None:
    running = engine(num_blocks=10)
    running.add("stays", [5] * (3 * BLOCK))
    running.end(running.scheduler.schedule())
    running.add("yields", PROMPT[: 4 * BLOCK - 1])
    failing = running.scheduler.schedule()
    request = running.scheduler.requests["yields"]
    running.scheduler.running.remove(request)
    running.scheduler._preempt_request(request, 0.0)
    assert running.found(PROMPT) > 0
    assert running.end(failing, {"yields": "gone"}) == {"yields": "gone"}
    assert running.found(PROMPT) == 0


def test_what_was_released_in_flight_is_forgotten_with_its_step(engine: Callable[..., Engine]) -> None:
    from vllm.v1.request import RequestStatus

    running = engine()
    running.add("leaves", PROMPT)
    steps = [running.scheduler.schedule(), running.scheduler.schedule()]
    running.scheduler.finish_requests("leaves", RequestStatus.FINISHED_ABORTED)
    released = running.scheduler.kv_cache_manager.moe_offload_released
    running.end(steps[0])
    assert set(released) == {"leaves"}
    running.end(steps[1])
    assert not released
    assert running.found(PROMPT) > 0
