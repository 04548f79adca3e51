"""Where a step begins and ends: tells the runtime, and fails the requests whose experts could not be read."""

from collections.abc import Callable
from typing import Any

from . import seams
from .batch import V1Batch
from .cuda.batch_v2 import V2Batch
from .tracing import add_up, tell_frontend
from .void_blocks import forget_released, remember_released, spread_over_shared_blocks
from .worker import WorkerOffload


def install() -> None:
    seams.WARM_UP.wrap(_warm_up_apart)
    seams.EXECUTE_MODEL.wrap(_run_step)
    seams.SAMPLE_TOKENS.wrap(_attach_failures)
    seams.UPDATE_FROM_OUTPUT.wrap(_fail_requests)
    seams.FREE_BLOCKS.wrap(remember_released)
    seams.POP_BLOCKS.wrap(remember_released)
    seams.REQUEST_OUTPUT.wrap(_name_error)
    seams.AVAILABLE_MEMORY.wrap(_leave_room_for_slots)
    seams.SHUTDOWN.wrap(_close)
    _add_stats_method()


def offload_of(worker: Any) -> WorkerOffload | None:
    """What a worker offloads, or None."""
    return getattr(worker, "moe_offload", None)


def _warm_up_apart(warm_up: Callable[..., Any]) -> Callable[..., Any]:
    """The V2 model runner warms up by steps over requests of its own, which are no requests of anybody."""

    def warm_up_and_begin(self: Any) -> Any:
        offload = offload_of(self)
        if offload is None:
            return warm_up(self)
        offload.warms_up = True
        try:
            return warm_up(self)
        finally:
            offload.warms_up = False

    return warm_up_and_begin


def _run_step(execute_model: Callable[..., Any]) -> Callable[..., Any]:
    def begin_execute_end(self: Any, scheduler_output: Any) -> Any:
        offload = offload_of(self)
        if offload is None or offload.warms_up:
            return execute_model(self, scheduler_output)
        batch = (V2Batch if self.use_v2_model_runner else V1Batch)(self.model_runner, scheduler_output)
        offload.begin_step(batch)
        output = execute_model(self, scheduler_output)
        if not batch.tokens:
            return output
        offload.end_step()
        return output if output is None else offload.with_failures(output)  # a pooling model's

    return begin_execute_end


def _attach_failures(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    def sample_and_attach(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, offload = sample_tokens(self, *args, **kwargs), offload_of(self)
        if output is None or offload is None or offload.warms_up:
            return output
        return offload.with_failures(output)

    return sample_and_attach


def _fail_requests(update_from_output: Callable[..., Any]) -> Callable[..., Any]:
    """Finish failed requests before their void tokens are looked at, and forget the KV blocks they touched."""

    def update(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        failed: dict[str, str] = getattr(model_runner_output, "moe_offload_failed", {})
        stalled = add_up(self, scheduler_output, model_runner_output)
        outputs = _update_without(self, failed, update_from_output, scheduler_output, model_runner_output)
        tell_frontend(outputs, stalled)
        forget_released(self.kv_cache_manager, scheduler_output.num_scheduled_tokens)
        return outputs

    return update


def _update_without(
    scheduler: Any, failed: dict[str, str], update_from_output: Callable[..., Any], *arguments: Any
) -> Any:
    if not failed:
        return update_from_output(scheduler, *arguments)
    import torch
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.request import RequestStatus

    reasons = spread_over_shared_blocks(scheduler, failed)
    finished = scheduler.finish_requests(list(reasons), RequestStatus.FINISHED_ERROR)
    outputs = update_from_output(scheduler, *arguments)
    for request in finished:
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
            EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                pooling_output=None if request.pooling_params is None else torch.empty(0),
                finish_reason=request.get_finished_reason(),
                stop_reason=reasons[request.request_id],
            )
        )
    return outputs


def _name_error(make_request_output: Callable[..., Any]) -> Callable[..., Any]:
    """Pooled results carry their error apart; vLLM sets it for no failure of a model."""

    def make(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if pooling_output is not None and isinstance(stop_reason, str) and kwargs.get("error") is None:
            from vllm.outputs import RequestError

            kwargs["error"] = RequestError("moe_offload_load_failed", stop_reason)
        return make_request_output(self, new_token_ids, pooling_output, finish_reason, stop_reason, *args, **kwargs)

    return make


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


def _add_stats_method() -> None:
    """``LLM.collective_rpc("moe_offload_stats")``: one dict of counters per rank, empty where nothing is offloaded."""
    from vllm.v1.worker.gpu_worker import Worker

    def moe_offload_stats(self: Any) -> dict[str, int | float]:
        offload = offload_of(self)
        return {} if offload is None else offload.stats()

    Worker.moe_offload_stats = moe_offload_stats
