"""vLLM's own scheduler, with steps in flight when one turns out to have failed: no void block is ever found again."""

from collections import deque
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 16
NUM_BLOCKS = 64


def engine_config(model: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return EngineArgs(
        str(model),
        block_size=BLOCK,
        max_num_batched_tokens=4 * BLOCK,
        max_num_seqs=4,
        enable_prefix_caching=True,
        additional_config={"moe_offload": {"cache": "25%"}},
    ).create_engine_config()


class Engine:
    """The scheduler of an engine whose steps the test ends when it likes, with whatever outputs it likes."""

    def __init__(self, config: Any, asynchronous: bool, num_blocks: int = NUM_BLOCKS):
        import torch
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

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

    def add(self, request_id: str, prompt: list[int], most_tokens: int = 50) -> Any:
        request = self._request(request_id, prompt, most_tokens)
        self.scheduler.add_request(request)
        return request

    def _request(self, request_id: str, prompt: list[int], most_tokens: int = 50) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        sampling = SamplingParams(max_tokens=most_tokens, ignore_eos=True)
        return Request(request_id, list(prompt), sampling, None, block_hasher=self._hasher)

    def end(self, step: Any, failed: dict[str, str] | None = None) -> dict[str, str]:
        """End ``step``; the reasons of the requests that got an error."""
        tokens = {request_id: [7] if self._generates(request_id) else [] for request_id in step.num_scheduled_tokens}
        every = self.answers(step, tokens, failed or {})
        return {one.request_id: one.stop_reason for one in every if str(one.finish_reason) == "error"}

    def answers(self, step: Any, tokens: dict[str, list[int]], failed: dict[str, str]) -> list[Any]:
        """End ``step``, which has sampled these tokens; everything that goes to clients."""
        from vllm.v1.outputs import ModelRunnerOutput

        indices = {request_id: index for index, request_id in enumerate(tokens)}
        output = copy(ModelRunnerOutput(list(tokens), indices, list(tokens.values())))
        if failed:
            output.moe_offload_failed = failed
        answered = self.scheduler.update_from_output(step, output)
        return [one for outputs in answered.values() for one in outputs.outputs]

    def preempt(self, request_id: str) -> None:
        request = self.scheduler.requests[request_id]
        self.scheduler.running.remove(request)
        self.scheduler._preempt_request(request, 0.0)

    def abort(self, request_id: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def blocks(self, request_id: str) -> list[int]:
        (numbers,) = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        return list(numbers)

    def _generates(self, request_id: str) -> bool:
        request = self.scheduler.requests.get(request_id)
        return request is not None and request.num_computed_tokens >= request.num_prompt_tokens

    def found(self, prompt: list[int]) -> int:
        """Tokens of ``prompt`` that the prefix cache would give to a request that comes now."""
        return self.scheduler.kv_cache_manager.get_computed_blocks(self._request("newcomer", prompt))[1]


@pytest.fixture(scope="module")
def engine(tiny_moe: Path) -> Callable[..., Engine]:
    config = engine_config(tiny_moe)
    return lambda asynchronous=False, **options: Engine(config, asynchronous, **options)


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
    running = engine()
    running.add("leaves", PROMPT[: 3 * BLOCK])
    running.add("shares", [*PROMPT[: 2 * BLOCK], 999])
    step = running.scheduler.schedule()
    assert set(step.num_scheduled_tokens) == {"leaves", "shares"}
    running.abort("leaves")
    assert running.end(step, {"leaves": "gone"}) == {"shares": "gone"}
    assert running.found(PROMPT) == 0


def test_a_request_that_is_preempted_while_its_step_fails(engine: Callable[..., Engine]) -> None:
    running = engine(num_blocks=10)
    running.add("stays", [5] * (3 * BLOCK))
    running.end(running.scheduler.schedule())
    running.add("yields", PROMPT[: 4 * BLOCK - 1])
    failing = running.scheduler.schedule()
    running.preempt("yields")
    assert running.found(PROMPT) > 0
    assert running.end(failing, {"yields": "gone"}) == {"yields": "gone"}
    assert running.found(PROMPT) == 0


def test_what_was_released_in_flight_is_forgotten_with_its_step(engine: Callable[..., Engine]) -> None:
    running = engine()
    running.add("leaves", PROMPT)
    steps = [running.scheduler.schedule(), running.scheduler.schedule()]
    running.abort("leaves")
    released = running.scheduler.kv_cache_manager.moe_offload_released
    running.end(steps[0])
    assert set(released) == {"leaves"}
    running.end(steps[1])
    assert not released
    assert running.found(PROMPT) > 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_request_fails_once_and_those_that_get_its_blocks_afterwards_go_on(
    engine: Callable[..., Engine], asynchronous: bool
) -> None:
    """The step that was in flight misses the same record."""
    running = engine(asynchronous, num_blocks=10)
    running.add("first", PROMPT)
    before, after = running.scheduler.schedule(), running.scheduler.schedule()
    assert running.end(before, {"first": "gone"}) == {"first": "gone"}
    running.add("second", [9] * (4 * BLOCK))
    blocks = running.scheduler.schedule()
    assert list(blocks.num_scheduled_tokens) == ["second"]
    assert running.end(after, {"first": "gone"}) == {}
    assert running.end(blocks) == {}
    assert list(running.scheduler.requests) == ["second"]
    assert running.found([9] * (4 * BLOCK) + [1]) == 4 * BLOCK


def test_a_block_that_was_given_anew_is_not_void(engine: Callable[..., Engine]) -> None:
    running = engine(num_blocks=5)
    running.add("leaves", PROMPT[: 4 * BLOCK - 1])
    failing, held = running.scheduler.schedule(), running.blocks("leaves")
    running.abort("leaves")
    running.add("comes", [9] * (4 * BLOCK - 1))
    after = running.scheduler.schedule()
    assert set(running.blocks("comes")) & set(held)
    assert running.end(failing, {"leaves": "gone"}) == {}
    assert running.end(after) == {}
    assert list(running.scheduler.requests) == ["comes"]


def test_what_was_computed_from_a_void_block_by_somebody_who_has_left(engine: Callable[..., Engine]) -> None:
    running = engine()
    running.add("first", PROMPT[: 3 * BLOCK])
    failing = running.scheduler.schedule()
    other = [*PROMPT[: 2 * BLOCK], *[9] * (2 * BLOCK)]
    running.add("shares", other)
    after = running.scheduler.schedule()
    running.abort("shares")
    assert running.found([*other, 1]) == 4 * BLOCK
    assert running.end(failing, {"first": "gone"}) == {"first": "gone"}
    running.end(after)
    running.add("again", PROMPT[: 2 * BLOCK + 1])
    running.end(running.scheduler.schedule())
    assert running.found([*other, 1]) == 2 * BLOCK


def test_whoever_shares_what_ended_well_stays(engine: Callable[..., Engine]) -> None:
    """Of a request that left while two of its steps were in flight, the first ends well."""
    running = engine()
    running.add("leaves", PROMPT)
    well, failing = running.scheduler.schedule(), running.scheduler.schedule()
    running.abort("leaves")
    running.add("shares", [*PROMPT[: 4 * BLOCK], 9])
    after = running.scheduler.schedule()
    assert after.num_scheduled_tokens == {"shares": 1}
    assert running.end(well) == {}
    assert running.end(failing, {"leaves": "gone"}) == {}
    assert running.end(after) == {}
    assert running.found(PROMPT) == 4 * BLOCK


class Step(NamedTuple):
    """One in flight, and what became of it, which nobody knows yet."""

    scheduled: Any
    tokens: dict[str, list[int]]
    """Sampled, by request."""
    failed: dict[str, str]
    """Where a record was missing."""
    void: set[str]
    """Requests whose rows are wrong: failed here, or computed from what is void."""
    wrote: set[int]
    """Blocks."""


class Memory:
    """What the KV cache really holds, while steps run in the order in which they are scheduled."""

    def __init__(self, running: Engine, num_blocks: int):
        self._running = running
        self._void = np.zeros((num_blocks, BLOCK), dtype=bool)

    def run(self, scheduled: Any, failed: set[str]) -> Step:
        tokens, void, wrote = {}, set(), set()
        for request_id, count in scheduled.num_scheduled_tokens.items():
            request = self._running.scheduler.requests[request_id]
            end = request.num_computed_tokens
            places = [(number, slice(None)) for number in self._running.blocks(request_id)][: -(-end // BLOCK)]
            kept = np.concatenate([self._void[place] for place in places])[: end - count]
            if request_id in failed or kept.any():
                void.add(request_id)
            for position in range(end - count, end):
                number = places[position // BLOCK][0]
                self._void[number, position % BLOCK] = request_id in void
                wrote.add(number)
            tokens[request_id] = [] if request.is_prefill_chunk else [7]
        return Step(scheduled, tokens, dict.fromkeys(failed, "gone"), void, wrote)

    def void_in_prefix_cache(self) -> set[int]:
        blocks = self._running.scheduler.kv_cache_manager.block_pool.blocks
        return {block.block_id for block in blocks if block.block_hash is not None and self._void[block.block_id].any()}


PREFIXES = [[token] * (5 * BLOCK) for token in (1, 2)]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), asynchronous=st.booleans())
def test_exactly_what_is_void_fails_and_leaves(
    engine: Callable[..., Engine], data: st.DataObject, asynchronous: bool
) -> None:
    """Two steps in flight, little memory, shared prefixes; requests come, are aborted, preempted, and fail."""
    num_blocks = data.draw(st.integers(8, 16), label="blocks")
    running = engine(asynchronous, num_blocks=num_blocks)
    memory, flying = Memory(running, num_blocks), deque[Step]()
    blamed: set[str] = set()
    void: set[str] = set()
    for number in range(data.draw(st.integers(4, 14), label="actions")):
        alive = sorted(running.scheduler.requests)
        if len(alive) < 4:
            prompt = data.draw(st.sampled_from(PREFIXES))[: data.draw(st.integers(1, 5 * BLOCK))] + [3] * (number % 3)
            running.add(f"r{number}", prompt, most_tokens=6)
        action = data.draw(st.sampled_from(["go on", "go on", "abort", "preempt"]))
        if alive and action == "abort":
            running.abort(data.draw(st.sampled_from(alive)))
        preemptible = sorted(request.request_id for request in running.scheduler.running)
        if preemptible and action == "preempt":
            running.preempt(data.draw(st.sampled_from(preemptible)))
        scheduled = running.scheduler.schedule()
        ids = sorted(scheduled.num_scheduled_tokens)
        failed = set(data.draw(st.lists(st.sampled_from(ids), max_size=1))) if ids else set()
        flying.append(memory.run(scheduled, failed))
        void |= flying[-1].void
        if len(flying) == 2:
            end_and_check(running, memory, flying, blamed, void)
    while flying:
        end_and_check(running, memory, flying, blamed, void)
    assert not running.scheduler.kv_cache_manager.moe_offload_released


def end_and_check(running: Engine, memory: Memory, flying: deque[Step], blamed: set[str], void: set[str]) -> None:
    step = flying.popleft()
    for answer in running.answers(step.scheduled, step.tokens, step.failed):
        assert answer.request_id not in blamed, "nothing comes after an error"
        if str(answer.finish_reason) == "error":
            assert answer.request_id in void, "it had nothing void"
            blamed.add(answer.request_id)
        else:
            assert answer.request_id not in step.void, "its token is void"
    assert memory.void_in_prefix_cache() <= {number for later in flying for number in later.wrote}
