"""Which requests and tokens the rows of a step belong to.

On a device that runs behind the host, with asynchronous scheduling above all, the host puts a step together before the
step before it has ended: the tokens that generation feeds back are in device memory alone. Requests, counts and prompts
are known at once. Tokens are copied behind whatever writes them, and waited for by those who read them only.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..runtime import Batch
from ..trace.recorder import ScheduledTokens


class HostCopy:
    """What a device's tensor holds at this point of the current stream, once the stream has got there."""

    def __init__(self, source: torch.Tensor):
        self._event: torch.Event | None = None
        if source.device.type == "cpu":
            self._copy = source.clone()
            return
        self._copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._copy.copy_(source, non_blocking=True)
        self._event = torch.Event(source.device)
        self._event.record()

    @property
    def array(self) -> NDArray[Any]:
        """Its place in host memory. What lies there counts from ``wait`` on."""
        return self._copy.numpy()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class RunnerRows(NamedTuple):
    """The rows of the running pass as a model runner has put them together, request by request."""

    requests: Sequence[str]
    positions: Sequence[int]
    """Of the first row of each request within the request."""
    prompts: Sequence[int]
    """Tokens of each request that were given rather than generated."""
    tokens: torch.Tensor
    """``[rows or more]``, where the pass reads them."""


class StepBatch(Batch):
    """One scheduled step, seen through one of vLLM's model runners. Its rows are known once its pass starts."""

    def __init__(self, scheduler_output: Any):
        super().__init__(
            scheduler_output.total_num_scheduled_tokens,
            scheduler_output.finished_req_ids,
            scheduler_output.num_scheduled_tokens,
        )
        self._output = scheduler_output
        self._tokens: HostCopy | None = None

    @abstractmethod
    def order(self) -> Sequence[str] | None:
        """The requests in the order of their rows; None where the runner does not say."""

    @abstractmethod
    def runner_rows(self) -> RunnerRows:
        """What the runner knows of the rows; asked only where it says their order."""

    def rows(self) -> Sequence[ScheduledTokens]:
        if not self._known_order():
            return ()
        known = self.runner_rows()
        self._tokens = HostCopy(known.tokens[: self.tokens])
        tokens = self._tokens.array
        drafts: Mapping[str, Sequence[int]] = self._output.scheduled_spec_decode_tokens
        rows, start = [], 0
        for request, position, prompt in zip(known.requests, known.positions, known.prompts, strict=True):
            part, start = tokens[start : start + self.scheduled[request]], start + self.scheduled[request]
            rows.append(ScheduledTokens(request, position, part, prompt, len(drafts.get(request, ()))))
        return rows

    def wait_for_tokens(self) -> None:
        if self._tokens is not None:
            self._tokens.wait()

    def new_prompts(self) -> Mapping[str, Sequence[int]]:
        new = self._output.scheduled_new_reqs
        return {request.req_id: request.prompt_token_ids for request in new if request.prompt_token_ids is not None}

    def requests_of(self, rows: Collection[int]) -> list[str]:
        """The requests that these rows of the batch belong to; all of the step where vLLM does not say."""
        order = self._known_order()
        if not order:
            return list(self.scheduled)
        owner = np.repeat(np.arange(len(order)), [self.scheduled[request] for request in order])
        return [order[index] for index in sorted({int(owner[row]) for row in rows if row < len(owner)})]

    def _known_order(self) -> Sequence[str]:
        order = self.order()
        return order if order is not None and set(order) == set(self.scheduled) else ()


class V1Batch(StepBatch):
    """A step of vLLM's V1 model runner."""

    def __init__(self, model_runner: Any, scheduler_output: Any):
        super().__init__(scheduler_output)
        self._runner = model_runner

    def order(self) -> Sequence[str] | None:
        batch = getattr(self._runner, "input_batch", None)
        return None if batch is None else batch.req_ids

    def runner_rows(self) -> RunnerRows:
        batch, runner = self._runner.input_batch, self._runner
        order: list[str] = batch.req_ids
        positions = batch.num_computed_tokens_cpu[: len(order)]
        if runner.use_async_scheduling and runner.num_spec_tokens > 0:
            positions = first_positions(runner.positions, [self.scheduled[request] for request in order])
        prompts = batch.num_prompt_tokens[: len(order)]
        return RunnerRows(order, positions.tolist(), prompts.tolist(), runner.input_ids.gpu)

    def prompt(self, request: str) -> NDArray[np.int32]:
        batch = self._runner.input_batch
        index = batch.req_id_to_index[request]
        prompt: NDArray[np.int32] = batch.token_ids_cpu[index, : batch.num_prompt_tokens[index]]
        return prompt


def first_positions(positions: torch.Tensor, counts: Sequence[int]) -> NDArray[np.int64]:
    """The position of each request's first row, read where the pass reads it.

    The host does not know it when guesses of a speculative decoder are in flight: how many will be rejected shows in
    device memory first. This waits for the device.

    Args:
        positions: ``[rows or more]``.
        counts: rows of each request.
    """
    starts = np.cumsum([0, *counts[:-1]])
    found: NDArray[np.int64] = positions[torch.from_numpy(starts).to(positions.device)].cpu().numpy()
    return found
