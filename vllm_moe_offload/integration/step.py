"""Where a step begins and ends: tells the runtime, and fails the requests whose experts could not be read."""

from collections.abc import Callable, Mapping
from typing import Any

from vllm.logger import init_logger

from . import seams
from .worker import WorkerOffload

logger = init_logger("vllm.moe_offload")


def install() -> None:
    seams.EXECUTE_MODEL.wrap(_begin_step)
    seams.SAMPLE_TOKENS.wrap(_report_failures)
    seams.UPDATE_FROM_OUTPUT.wrap(_fail_requests)
    seams.AVAILABLE_MEMORY.wrap(_leave_room_for_slots)
    seams.RELOAD_WEIGHTS.wrap(_refuse_reload)
    seams.SHUTDOWN.wrap(_close)
    _add_stats_method()


def offload_of(worker: Any) -> WorkerOffload | None:
    """What a worker offloads, or None."""
    return getattr(worker, "moe_offload", None)


def _begin_step(execute_model: Callable[..., Any]) -> Callable[..., Any]:
    def begin_and_execute(self: Any, scheduler_output: Any) -> Any:
        offload = offload_of(self)
        if offload is not None:
            offload.begin_step(self.model_runner, scheduler_output)
        return execute_model(self, scheduler_output)

    return begin_and_execute


def _report_failures(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    def sample_and_report(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample_tokens(self, *args, **kwargs)
        offload = offload_of(self)
        if offload is None:
            return output
        offload.end_step()
        failed = offload.failed_requests(self.model_runner)
        if failed:
            for reason in sorted(set(failed.values())):
                logger.error("moe-offload: failing %d request(s): %s", len(failed), reason)
            output.moe_offload_failed = failed
        return output

    return sample_and_report


def _fail_requests(update_from_output: Callable[..., Any]) -> Callable[..., Any]:
    """Finish failed requests before their void tokens are looked at, and forget the KV blocks they touched."""

    def update(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        failed: dict[str, str] | None = getattr(model_runner_output, "moe_offload_failed", None)
        if not failed:
            return update_from_output(self, scheduler_output, model_runner_output)
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
        from vllm.v1.request import RequestStatus

        reasons = spread_over_shared_blocks(self, failed, scheduler_output.num_scheduled_tokens)
        finished = self.finish_requests(list(reasons), RequestStatus.FINISHED_ERROR)
        outputs = update_from_output(self, scheduler_output, model_runner_output)
        for request in finished:
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=reasons[request.request_id],
                )
            )
        return outputs

    return update


def spread_over_shared_blocks(
    scheduler: Any, failed: dict[str, str], scheduled_tokens: Mapping[str, int]
) -> dict[str, str]:
    """All requests that hold KV blocks which this step left void, with the reason; void blocks leave the prefix cache.

    A request scheduled in the same step as another may have taken over blocks that the other is only computing.
    """
    manager = scheduler.kv_cache_manager
    reasons: dict[str, str] = {}
    spreading = [request_id for request_id in failed if request_id in scheduler.requests]
    reasons.update({request_id: failed[request_id] for request_id in spreading})
    while spreading:
        request_id = spreading.pop()
        computed_before = scheduler.requests[request_id].num_computed_tokens - scheduled_tokens.get(request_id, 0)
        void = set()
        groups = zip(manager.get_block_ids(request_id), scheduler.kv_cache_config.kv_cache_groups, strict=True)
        for group, (blocks, description) in enumerate(groups):
            first_void = max(0, computed_before) // description.kv_cache_spec.block_size
            void |= {(group, block) for block in blocks[first_void:]}
        manager.evict_blocks({block for _, block in void})
        for other in scheduler.running:
            held = {(g, block) for g, blocks in enumerate(manager.get_block_ids(other.request_id)) for block in blocks}
            if other.request_id not in reasons and void & held:
                reasons[other.request_id] = reasons[request_id]
                spreading.append(other.request_id)
    return reasons


def _leave_room_for_slots(determine_available_memory: Callable[..., Any]) -> Callable[..., Any]:
    """Slots take memory when they are first filled, after the KV cache has been sized by what is in use then."""

    def determine(self: Any) -> int:
        available = determine_available_memory(self)
        offload = offload_of(self)
        if offload is None or self.cache_config.kv_cache_memory_bytes is not None:
            return available
        return available - offload.untouched_bytes()

    return determine


def _close(shutdown: Callable[..., Any]) -> Callable[..., Any]:
    def close_and_shutdown(self: Any) -> None:
        offload = offload_of(self)
        if offload is not None:
            offload.close()
        shutdown(self)

    return close_and_shutdown


def _refuse_reload(reload_weights: Callable[..., Any]) -> Callable[..., Any]:
    def reload(self: Any, *args: Any, **kwargs: Any) -> Any:
        if offload_of(self) is not None:
            from ..errors import UnsupportedError

            raise UnsupportedError(
                "moe-offload does not work with reloading weights: the store holds the old ones; restart the engine"
            )
        return reload_weights(self, *args, **kwargs)

    return reload


def _add_stats_method() -> None:
    """``LLM.collective_rpc("moe_offload_stats")``: one dict of counters per rank, empty where nothing is offloaded."""
    from vllm.v1.worker.gpu_worker import Worker

    def moe_offload_stats(self: Any) -> dict[str, int | float]:
        offload = offload_of(self)
        return {} if offload is None else offload.stats()

    Worker.moe_offload_stats = moe_offload_stats
