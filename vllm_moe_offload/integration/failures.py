"""Requests whose experts could not be read: what one rank finds reaches every rank before the step's output leaves.

A request that failed on any rank fails on all of them. Where the ranks share no memory the engine ends instead, before
the failed rank contributes to the step.
"""

import mmap
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch.distributed
from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger
from vllm.v1.outputs import AsyncModelRunnerOutput

from ..stats import Stats
from .failure_board import FailureBoard, board_bytes, create_board_file, map_board_file

logger = init_logger(__name__)


class _RunningStep(NamedTuple):
    number: int
    requests: tuple[str, ...]
    """In the order of the scheduler, which all ranks share."""


class StepFailures:
    """What one worker knows of the failures of its steps.

    Args:
        board: of all ranks; None where they share no memory.
        wait_for_ranks: returns when every rank has called it.
    """

    def __init__(self, board: FailureBoard | None, wait_for_ranks: Callable[[], None] = lambda: None):
        self._board = board
        self._wait_for_ranks = wait_for_ranks
        self._step = _RunningStep(0, ())
        self.stats: Stats | None = None
        """Where failed requests are counted."""

    def begin_step(self, scheduled: Mapping[str, int]) -> None:
        """A step over ``scheduled`` requests starts. Called on every rank for every step, in the same order."""
        self._step = _RunningStep(self._step.number + 1, tuple(scheduled))

    def add(self, requests: Iterable[str], reason: str) -> None:
        """``requests`` of the running step have failed here; this rank has not yet contributed what it computed.

        Raises:
            SystemExit: the other ranks cannot be reached.
        """
        if self._board is None:
            logger.error("the engine ends, because its ranks share no memory in which to fail requests: %s", reason)
            raise SystemExit(f"moe-offload: {reason}")
        place = {request: index for index, request in enumerate(self._step.requests)}
        self._board.post(self._step.number, [place[request] for request in requests], reason)

    def announce_late(self) -> None:
        """A step may fail here when this rank has already contributed to it: a lease can be lost then.

        From now on every rank waits for the others at the end of each step.
        """
        if self._board is not None:
            self._board.announce_late()

    def end_step(self) -> None:
        """This rank has added all its failures of the running step. Every rank says so of every step."""
        if self._board is not None and self._board.may_be_late:
            self._wait_for_ranks()

    def attach(self, output: Any) -> Any:
        """``output`` of the running step, with the failed requests of all ranks as ``moe_offload_failed``.

        They are looked up when the output is complete, which for an asynchronous one is later.
        """
        if isinstance(output, AsyncModelRunnerOutput):
            return _CheckedOutput(output, self, self._step)
        return self._marked(output, self._step)

    def _marked(self, output: Any, step: _RunningStep) -> Any:
        failed = {} if self._board is None else self._board.read(step.number)
        if not failed:
            return output
        if self.stats is not None:
            self.stats.failed_requests += len(failed)
        for reason in sorted(set(failed.values())):
            logger.error("failing %d request(s): %s", list(failed.values()).count(reason), reason)
        output = copy(output)  # vLLM shares its empty output
        output.moe_offload_failed = {step.requests[index]: reason for index, reason in failed.items()}
        return output


class _CheckedOutput(AsyncModelRunnerOutput):
    """An output that is still being computed when the worker returns it."""

    def __init__(self, output: AsyncModelRunnerOutput, failures: StepFailures, step: _RunningStep):
        self._output, self._failures, self._step = output, failures, step

    def get_output(self) -> Any:
        return self._failures._marked(self._output.get_output(), self._step)


def connect_ranks(requests: int) -> StepFailures:
    """The failures of this worker, connected with those of the engine's other ranks, all of which call this together.

    Args:
        requests: the most that one step schedules.
    """
    group = get_world_group()
    size = board_bytes(group.world_size, requests)
    if group.world_size == 1:
        return StepFailures(FailureBoard(mmap.mmap(-1, size), ranks=1, rank=0, requests=requests))
    memory = _shared_memory(group, size)
    if memory is None:
        logger.warning("the ranks of this engine share no memory: a record that cannot be read ends the engine")
        return StepFailures(None)
    board = FailureBoard(memory, group.world_size, group.rank_in_group, requests)
    return StepFailures(board, partial(torch.distributed.barrier, group=group.cpu_group))


def _shared_memory(group: Any, size: int) -> mmap.mmap | None:
    """Memory that all ranks of ``group`` have mapped; None on every rank where one of them cannot."""
    path = None
    if group.is_first_rank:
        try:
            path = create_board_file(size)
        except OSError as error:
            logger.warning("no memory to share between ranks: %s", error)
    path = group.broadcast_object(path)
    memory = None if path is None else map_board_file(path, size)
    mapped: list[bool] = [False] * group.world_size
    torch.distributed.all_gather_object(mapped, memory is not None, group=group.cpu_group)
    if group.is_first_rank and path is not None:
        path.unlink()
    return memory if all(mapped) else None
