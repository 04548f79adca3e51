"""How long a request waited comes from its steps' outputs to its span, beside the headers that its client gave."""

from types import SimpleNamespace
from typing import Any

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput

from vllm_moe_offload.integration import tracing
from vllm_moe_offload.integration.tracing import STALL_SECONDS, add_up, tell_frontend, with_stall

PARENT = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}


class LateOutput(AsyncModelRunnerOutput):
    def get_output(self) -> Any:
        return EMPTY_MODEL_RUNNER_OUTPUT


def outputs(**finished: bool) -> dict[int, Any]:
    made = [
        SimpleNamespace(request_id=name, finish_reason="stop" if ends else None, trace_headers=dict(PARENT))
        for name, ends in finished.items()
    ]
    return {0: SimpleNamespace(outputs=made)}


def attributes_of_span(output: Any) -> tuple[dict[str, Any], Any]:
    """Of the span that is made for ``output``, and the headers that vLLM sees."""
    spans: list[dict[str, Any]] = []
    make = tracing._add_attribute(lambda **span: spans.append(span["attributes"]))
    trace = tracing._take_header(lambda self, output: make(span_name="llm_request", attributes={"other": 1}))
    trace(None, output)
    return spans[0], output.trace_headers


def test_the_steps_of_a_request_add_up_on_its_span() -> None:
    scheduler = SimpleNamespace(requests={name: SimpleNamespace() for name in "ab"})
    for step, (requests, seconds) in enumerate([("a", 0.5), ("ab", 0.25), ("ab", 0.0)]):
        output = with_stall(EMPTY_MODEL_RUNNER_OUTPUT, seconds)
        stalled = add_up(scheduler, SimpleNamespace(num_scheduled_tokens=dict.fromkeys(requests, 1)), output)
        of_step = outputs(a=step == 2, b=False)
        tell_frontend(of_step, stalled)
    ended, goes_on = of_step[0].outputs
    assert attributes_of_span(ended) == ({"other": 1, STALL_SECONDS: 0.75}, PARENT)
    assert goes_on.trace_headers == PARENT
    assert attributes_of_span(goes_on) == ({"other": 1}, PARENT)


def test_an_output_that_is_still_computed_says_it_when_it_is_complete() -> None:
    assert with_stall(LateOutput(), 0.5).get_output().moe_offload_stalled == 0.5
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, "moe_offload_stalled"), "which all steps share"


def test_nothing_is_added_up_where_requests_are_not_traced() -> None:
    scheduler = SimpleNamespace(requests={"a": SimpleNamespace()})
    step = SimpleNamespace(num_scheduled_tokens={"a": 1})
    assert add_up(scheduler, step, EMPTY_MODEL_RUNNER_OUTPUT) == {} and not vars(scheduler.requests["a"])
