"""Which requests and tokens the rows of a step belong to."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime import Batch
from ..trace.recorder import ScheduledTokens


class StepBatch(Batch):
    """One scheduled step, seen through vLLM's V1 model runner: when its pass starts, the batch is put together."""

    def __init__(self, model_runner: Any, scheduler_output: Any):
        super().__init__(scheduler_output.total_num_scheduled_tokens, scheduler_output.finished_req_ids)
        self.scheduled: Mapping[str, int] = scheduler_output.num_scheduled_tokens
        """Tokens, by request."""
        self._output, self._runner = scheduler_output, model_runner

    def rows(self) -> list[ScheduledTokens]:
        batch = self._runner.input_batch
        order: list[str] = batch.req_ids
        counts = [self.scheduled[request] for request in order]
        tokens = self._runner.input_ids.gpu[: sum(counts)].numpy().copy()
        positions = batch.num_computed_tokens_cpu[: len(order)].tolist()
        prompts = batch.num_prompt_tokens[: len(order)].tolist()
        drafts: Mapping[str, Sequence[int]] = self._output.scheduled_spec_decode_tokens
        rows, start = [], 0
        for request, count, position, prompt in zip(order, counts, positions, prompts, strict=True):
            part, start = tokens[start : start + count], start + count
            rows.append(ScheduledTokens(request, position, part, prompt, len(drafts.get(request, ()))))
        return rows

    def prompt(self, request: str) -> NDArray[np.int32]:
        batch = self._runner.input_batch
        index = batch.req_id_to_index[request]
        prompt: NDArray[np.int32] = batch.token_ids_cpu[index, : batch.num_prompt_tokens[index]]
        return prompt

    def requests_of(self, rows: Collection[int]) -> list[str]:
        """The requests that these rows of the batch belong to; all of the step where vLLM does not say."""
        order = getattr(getattr(self._runner, "input_batch", None), "req_ids", None)
        if order is None or set(order) != set(self.scheduled):
            return list(self.scheduled)
        owner = np.repeat(np.arange(len(order)), [self.scheduled[request] for request in order])
        return [order[index] for index in sorted({int(owner[row]) for row in rows if row < len(owner)})]
