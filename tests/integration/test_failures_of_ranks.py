"""Ranks agree on which requests of a step have failed, by the time one of them has the step's result."""

import ctypes
import mmap
import multiprocessing
import os
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.integration import failure_board
from vllm_moe_offload.integration.failure_board import FailureBoard, board_bytes

RANKS = 2
REQUESTS = 4
STEPS = 100
"""More than a board has room for."""
NEW_MOUNTS = 0x00020000

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["vllm", "vllm.entrypoints.llm", "tests.e2e.live_engine"])

Failed = dict[int, dict[str, str]]
"""By step."""


class Rank:
    """One process of a distributed engine that computes nothing."""

    def __init__(self, rank: int, meeting_point: Path, apart: bool):
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed.parallel_state import get_world_group, init_distributed_environment

        from vllm_moe_offload.integration.failures import connect_ranks

        self.rank = rank
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(RANKS, rank, f"file://{meeting_point}", rank, "gloo")
        if apart and rank:
            mount_own_shared_memory()
        self.failures = connect_ranks(REQUESTS)
        self.group = get_world_group().cpu_group

    def run(self, fails: dict[int, dict[int, list[str]]], late: bool) -> Failed:
        """Run all steps; ``fails``: by step and rank, which requests. What each output says.

        Args:
            late: the second rank adds its failures when it has contributed to the step.
        """
        import torch
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

        def add(step: int) -> None:
            for request in fails.get(step, {}).get(self.rank, []):
                self.failures.add([request], f"rank {self.rank}, step {step}")

        late = late and self.rank == 1
        if late:
            self.failures.announce_late()
        torch.distributed.barrier(group=self.group)
        seen: Failed = {}
        for step in range(STEPS):
            self.failures.begin_step(dict.fromkeys(requests_of(step), 1))
            if not late:
                add(step)
            torch.distributed.all_reduce(torch.zeros(1), group=self.group)
            if late:
                add(step)
            self.failures.end_step()
            output = self.failures.attach(EMPTY_MODEL_RUNNER_OUTPUT)
            if failed := getattr(output, "moe_offload_failed", None):
                seen[step] = failed
        assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, "moe_offload_failed")
        return seen


def requests_of(step: int) -> list[str]:
    """Never two steps alike."""
    return [f"r{(step + i) % 7}" for i in range(1 + step % REQUESTS)]


def mount_own_shared_memory() -> None:
    """As a rank in a container, or on a host, of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)


def _run(connection: Connection, rank: int, meeting_point: Path, apart: bool, late: bool, fails: Any) -> None:
    answer: Any
    try:
        answer = Rank(rank, meeting_point, apart).run(fails, late)
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"
    connection.send(answer)
    os._exit(0)


Launch = Callable[..., list[Any]]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    def start(fails: Any, apart: bool = False, late: bool = False) -> list[Any]:
        pipes = [_PROCESSES.Pipe() for _ in range(RANKS)]
        ranks = [
            _PROCESSES.Process(target=_run, args=(theirs, rank, tmp_path / "meet", apart, late, fails))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        answers = [ours.recv() for ours, _ in pipes]
        for process in ranks:
            process.join()
        return answers

    return start


@pytest.mark.parametrize("late", [False, True])
def test_what_fails_on_one_rank_fails_on_all(launch: Launch, late: bool) -> None:
    before = board_files()
    fails = {
        0: {0: ["r0"]},
        3: {1: ["r3", "r5"]},
        7: {0: ["r1"], 1: ["r0", "r1"]},
        3 + 64: {0: requests_of(3 + 64)[:1]},
        99: {1: requests_of(99)},
    }
    answers = launch(fails, late=late)
    assert answers[0] == answers[1]
    assert {step: set(failed) for step, failed in answers[0].items()} == {
        step: {request for requests in by_rank.values() for request in requests} for step, by_rank in fails.items()
    }
    assert answers[0][3]["r5"] == "rank 1, step 3"
    assert board_files() == before


def test_ranks_without_common_memory_end_before_they_contribute(launch: Launch) -> None:
    if os.geteuid():
        pytest.skip("only root may mount")
    sound, damaged = launch({5: {1: ["r5"]}}, apart=True)
    if "unshare" in damaged or "CalledProcessError" in damaged:
        pytest.skip("no mounts of one's own here")
    assert damaged == "SystemExit: moe-offload: rank 1, step 5"
    assert sound.startswith("RuntimeError: "), "the other rank waited for what never came"


def board_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("moe-offload-failures-*")}


@settings(max_examples=60, deadline=None)
@given(
    posts=st.lists(
        st.tuples(st.integers(0, RANKS - 1), st.integers(1, 5), st.sets(st.integers(0, REQUESTS - 1))), max_size=20
    ),
    reason=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=1500),
)
def test_a_board_says_what_was_posted_and_nothing_of_other_steps(
    posts: list[tuple[int, int, set[int]]], reason: str
) -> None:
    """Ranks go through steps in order, and no further ahead of a reader than the board has room."""
    memory = mmap.mmap(-1, board_bytes(RANKS, REQUESTS))
    boards = [FailureBoard(memory, RANKS, rank, REQUESTS) for rank in range(RANKS)]
    expected: dict[int, set[int]] = {}
    for rank, step, requests in sorted(posts, key=lambda post: post[1]):
        boards[rank].post(step, requests, reason)
        expected.setdefault(step, set()).update(requests)
        assert boards[1 - rank].read(step) == dict.fromkeys(expected[step], reason[:1000])
        assert not boards[0].read(step + failure_board.STEPS)
    assert all(set(boards[0].read(step)) == requests for step, requests in expected.items())


def test_an_asynchronous_output_is_marked_with_the_failures_of_its_own_step() -> None:
    """vLLM's worker hands it to another thread, and goes on to the next step meanwhile."""
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput

    from vllm_moe_offload.integration.failures import StepFailures

    class Later(AsyncModelRunnerOutput):
        def get_output(self) -> Any:
            return EMPTY_MODEL_RUNNER_OUTPUT

    memory = mmap.mmap(-1, board_bytes(RANKS, REQUESTS))
    own, other = (StepFailures(FailureBoard(memory, RANKS, rank, REQUESTS)) for rank in range(RANKS))
    for failures in (own, other):
        failures.begin_step({"a": 1, "b": 1})
    first = own.attach(Later())
    assert isinstance(first, AsyncModelRunnerOutput), "as the worker tells asynchronous outputs"
    other.add(["b"], "gone")
    own.begin_step({"b": 1, "c": 1})
    second = own.attach(Later())
    assert first.get_output().moe_offload_failed == {"b": "gone"}
    assert second.get_output() is EMPTY_MODEL_RUNNER_OUTPUT
