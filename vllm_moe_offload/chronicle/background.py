"""A thread for what can wait: it runs at the lowest priority, beside the compute threads."""

import os
import threading
from collections.abc import Callable


class Background:
    """Runs one job again and again.

    Args:
        job: called every ``period_seconds``.
        failed: told of every exception it ends with; the next call comes all the same.
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
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="moe-offload-background", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let a call that is under way end, and the thread with it."""
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, 19)
        if self._cpus:
            os.sched_setaffinity(thread, self._cpus)
        while not self._closing.wait(self._period):
            try:
                self._job()
            except Exception as error:
                self._failed(error)
