"""How long a request has waited for experts, on its OpenTelemetry span where vLLM traces requests.

vLLM makes the span in its frontend when a request ends. What workers know reaches the scheduler with each step's
output, adds up there, and goes on with the request's last output, among its trace headers.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from copy import copy
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput

from . import seams

STALL_SECONDS = "moe_offload.stall_seconds"
"""The span's attribute: time that forward passes with this request waited for experts."""
_HEADER = "moe-offload-stall-seconds"
_stalled: ContextVar[str | None] = ContextVar("stalled", default=None)
"""Of the request whose span is being made."""


def install() -> None:
    seams.REQUEST_SPAN.wrap(_take_header)
    seams.SPAN.wrap(_add_attribute)


def traces_requests(vllm_config: Any) -> bool:
    """Whether vLLM traces requests."""
    return vllm_config.observability_config.otlp_traces_endpoint is not None


def with_stall(output: Any, seconds: float) -> Any:
    """``output`` of a step that has waited so long for experts."""
    if isinstance(output, AsyncModelRunnerOutput):
        return _StalledOutput(output, seconds)
    output = copy(output)  # vLLM shares its empty output
    output.moe_offload_stalled = seconds
    return output


class _StalledOutput(AsyncModelRunnerOutput):
    """An output that is still being computed when the worker returns it."""

    def __init__(self, output: AsyncModelRunnerOutput, seconds: float):
        self._output, self._seconds = output, seconds

    def get_output(self) -> Any:
        return with_stall(self._output.get_output(), self._seconds)


def add_up(scheduler: Any, scheduler_output: Any, output: Any) -> dict[str, float]:
    """The requests of a step have all waited as long as its ``output`` says, and longer over all their steps.

    Returns:
        seconds by request; nothing where requests are not traced.
    """
    seconds: float | None = getattr(output, "moe_offload_stalled", None)
    if seconds is None:
        return {}
    stalled: dict[str, float] = {}
    for request_id in scheduler_output.num_scheduled_tokens:
        request = scheduler.requests.get(request_id)
        if request is not None:
            stalled[request_id] = getattr(request, "moe_offload_stalled", 0.0) + seconds
            request.moe_offload_stalled = stalled[request_id]
    return stalled


def tell_frontend(outputs: Mapping[int, Any], stalled: Mapping[str, float]) -> None:
    """Send along with the last output of each request how long it has waited."""
    if not stalled:
        return
    for of_client in outputs.values():
        for output in of_client.outputs:
            if output.finish_reason is not None and output.request_id in stalled:
                header = {_HEADER: repr(stalled[output.request_id])}
                output.trace_headers = {**(output.trace_headers or {}), **header}


def _take_header(do_tracing: Callable[..., None]) -> Callable[..., None]:
    def trace(self: Any, engine_core_output: Any, *args: Any, **kwargs: Any) -> None:
        headers = dict(engine_core_output.trace_headers or {})
        token = _stalled.set(headers.pop(_HEADER, None))
        engine_core_output.trace_headers = headers or None
        try:
            do_tracing(self, engine_core_output, *args, **kwargs)
        finally:
            _stalled.reset(token)

    return trace


def _add_attribute(make_span: Callable[..., None]) -> Callable[..., None]:
    def make(*args: Any, attributes: dict[str, Any] | None = None, **kwargs: Any) -> None:
        stalled = _stalled.get()
        if stalled is not None:
            attributes = {**(attributes or {}), STALL_SECONDS: float(stalled)}
        make_span(*args, attributes=attributes, **kwargs)

    return make
