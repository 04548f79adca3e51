"""What can wait is done in order, beside the steps, and before the end."""

import threading

import numpy as np

from vllm_moe_offload.learning.background import Background
from vllm_moe_offload.runtime import Batch, RoutingTracer
from vllm_moe_offload.trace.recorder import Recorder, ScheduledTokens

SHAPE = (2, 4, 2)


def test_errands_run_in_order_on_another_thread_and_before_it_ends() -> None:
    done: list[int] = []
    threads: set[int] = set()
    failures: list[Exception] = []
    go = threading.Event()

    def errand(number: int) -> None:
        assert go.wait(30)
        threads.add(threading.get_ident())
        done.append(number)
        if number == 1:
            raise ValueError("the second errand fails")

    background = Background(lambda: None, 3600.0, failures.append)
    for number in range(4):
        background.soon(lambda number=number: errand(number))
    assert not done, "whoever gives an errand does not wait for it"
    go.set()
    background.close()
    assert done == [0, 1, 2, 3] and threads and threading.get_ident() not in threads
    assert [str(failure) for failure in failures] == ["the second errand fails"]


def test_the_job_comes_again_and_again_also_after_it_failed() -> None:
    calls, often, failures = [0], threading.Event(), []

    def job() -> None:
        calls[0] += 1
        if calls[0] >= 3:
            often.set()
        raise ValueError

    background = Background(job, 0.001, failures.append)
    assert often.wait(30)
    background.close()
    assert len(failures) == calls[0]


class Prompt(Batch):
    def rows(self) -> list[ScheduledTokens]:
        return [ScheduledTokens("a", 0, np.array([7], np.int32), 1)]

    def prompt(self, request: str) -> np.ndarray:
        return np.array([7], np.int32)


def test_what_becomes_of_a_request_that_ended_is_left_for_later() -> None:
    told: list[int] = []
    jobs: list = []
    tracer = RoutingTracer(Recorder(SHAPE), lambda trace, state: told.append(trace.num_tokens), None, later=jobs.append)
    tracer.begin_step(Prompt(1))
    for layer in range(SHAPE[0]):
        tracer.observe(layer, np.array([[0, 1]]), np.array([[0.5, 0.5]], np.float32))
    tracer.end_step()
    for request in ("a", "never seen"):
        tracer.end_request(request, None)
    assert not told and len(jobs) == 1
    jobs[0]()
    assert told == [1]
