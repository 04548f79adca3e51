"""A thread for what can wait: it runs at the lowest priority, beside the compute threads, one job after another."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]


class Background:
    """Runs jobs in the order given, and one job again and again.

    Args:
        cpus: where the thread may run; None leaves it where the process runs.
        regularly: run every ``period_seconds``, and a last time by ``close``.
        failed: told of every exception a job ends with; the thread goes on.
    """

    def __init__(
        self, regularly: Job, period_seconds: float, failed: Callable[[Exception], None], cpus: set[int] | None = None
    ):
        self._regularly = regularly
        self._period = period_seconds
        self._failed = failed
        self._cpus = cpus
        self._jobs: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="moe-offload-background", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Run ``job`` as soon as those before it are done."""
        with self._wake:
            self._jobs.append(job)
            self._wake.notify()

    def close(self) -> None:
        """Finish all jobs, run the regular one, end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._run(self._regularly)

    def _work(self) -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, 19)
        if self._cpus:
            os.sched_setaffinity(thread, self._cpus)
        due = time.monotonic() + self._period
        while True:
            with self._wake:
                while not self._jobs and not self._closing and time.monotonic() < due:
                    self._wake.wait(due - time.monotonic())
                job = self._jobs.popleft() if self._jobs else None
                if job is None and self._closing:
                    return
            self._run(job or self._regularly)
            if job is None:
                due = time.monotonic() + self._period

    def _run(self, job: Job) -> None:
        try:
            job()
        except Exception as error:
            self._failed(error)
