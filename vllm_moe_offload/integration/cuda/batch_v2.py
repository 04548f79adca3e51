"""The rows of a step of vLLM's V2 model runner, which keeps its batch in device memory and hands it from call to call.

What the host knows when the pass starts: the requests in their order, how many tokens of each are scheduled, and the
prompts, which the scheduler has sent. What it does not: tokens that the step before has generated, and, with a
speculative decoder, where a request's rows begin.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import seams
from ..batch import RunnerRows, StepBatch, first_positions
from .begin_pass import begin_pass

_INPUTS = "moe_offload_inputs"
"""Attribute of a V2 runner: the batch that it has put together last."""


def install() -> None:
    seams.V2_INPUTS.wrap(_keep_inputs)


def _keep_inputs(prepare_inputs: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_and_keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare_inputs(self, *args, **kwargs)
        setattr(self, _INPUTS, inputs)
        begin_pass(self)
        return inputs

    return prepare_and_keep


class V2Batch(StepBatch):
    """A step of vLLM's V2 model runner."""

    def __init__(self, model_runner: Any, scheduler_output: Any):
        super().__init__(scheduler_output)
        self._runner = model_runner
        self._prompts = {request.req_id: request for request in scheduler_output.scheduled_new_reqs}

    @property
    def _inputs(self) -> Any:
        return getattr(self._runner, _INPUTS, None)

    def order(self) -> Sequence[str] | None:
        """None where rows are parted among ranks, or how many there are of a request is decided on the device."""
        inputs = self._inputs
        if inputs is None or self._runner.pcp_manager is not None or inputs.num_tokens != self.tokens:
            return None
        order: list[str] = inputs.req_ids
        return order

    def runner_rows(self) -> RunnerRows:
        inputs, states = self._inputs, self._runner.req_states
        positions = inputs.num_computed_tokens_np
        if self._runner.num_speculative_steps > 0:
            positions = first_positions(inputs.positions, inputs.num_scheduled_tokens.tolist())
        prompts = states.prompt_len.np[inputs.idx_mapping_np]
        return RunnerRows(inputs.req_ids, positions.tolist(), prompts.tolist(), inputs.input_ids)

    def prompt(self, request: str) -> NDArray[np.int32]:
        states = self._runner.req_states
        index = states.req_id_to_index[request]
        length = int(states.prompt_len.np[index])
        if request in self._prompts:
            return np.array(self._prompts[request].prefill_token_ids[:length], dtype=np.int32)
        prompt: NDArray[np.int32] = states.all_token_ids.gpu[index, :length].cpu().numpy()
        return prompt
