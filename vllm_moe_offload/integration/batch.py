"""Which requests and tokens the rows of the running step belong to."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..trace.recorder import ScheduledTokens


class StepBatch:
    """One scheduled step, seen through vLLM's V1 model runner. Valid once the runner has put its batch together."""

    def __init__(self, model_runner: Any, scheduler_output: Any):
        self._runner = model_runner
        self._scheduled: Mapping[str, int] = scheduler_output.num_scheduled_tokens
        self._drafts: Mapping[str, Sequence[int]] = scheduler_output.scheduled_spec_decode_tokens

    def rows(self) -> list[ScheduledTokens]:
        batch = self._runner.input_batch
        order: list[str] = batch.req_ids
        counts = [self._scheduled[request] for request in order]
        tokens = self._runner.input_ids.gpu[: sum(counts)].numpy().copy()
        positions = batch.num_computed_tokens_cpu[: len(order)].tolist()
        prompts = batch.num_prompt_tokens[: len(order)].tolist()
        rows, start = [], 0
        for request, count, position, prompt in zip(order, counts, positions, prompts, strict=True):
            part, start = tokens[start : start + count], start + count
            rows.append(ScheduledTokens(request, position, part, prompt, len(self._drafts.get(request, ()))))
        return rows

    def prompt(self, request: str) -> NDArray[np.int32]:
        batch = self._runner.input_batch
        index = batch.req_id_to_index[request]
        return batch.token_ids_cpu[index, : batch.num_prompt_tokens[index]]
