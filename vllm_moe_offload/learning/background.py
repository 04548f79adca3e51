"""A thread for what can wait: it runs at the lowest priority, beside the compute threads."""

import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from ..threads import ReportedThread, bind_to, use_lowest_priority


class Background:
    """Runs one job again and again, and errands between.

    Args:
        job: called every ``period_seconds``.
        failed: called with every exception of the job or an errand; the next call comes all the same.
        cpus: where the thread may run; None leaves it where the process runs.
    """

    def __init__(
        self,
        job: Callable[[], None],
        period_seconds: float,
        failed: Callable[[Exception], None],
        cpus: set[int] | None = None,
    ):
        self._job, self._period, self._failed, self._cpus = job, period_seconds, failed, cpus
        self._errands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = ReportedThread(target=self._work, name="moe-offload-background", daemon=True)
        self._thread.start()

    def soon(self, errand: Callable[[], None]) -> None:
        """Run ``errand`` next, after those given before. Returns at once."""
        self._errands.put(errand)

    def close(self) -> None:
        """Let the thread end what it was given, and then itself."""
        self._errands.put(None)
        self._thread.join()

    def _work(self) -> None:
        use_lowest_priority()
        bind_to(self._cpus)
        due = time.monotonic() + self._period
        while True:
            try:
                errand = self._errands.get(timeout=max(0.0, due - time.monotonic()))
            except Empty:
                due = time.monotonic() + self._period
                self._run(self._job)
            else:
                if errand is None:
                    return
                self._run(errand)

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:
            self._failed(error)
