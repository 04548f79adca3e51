"""Whether a process is certainly dead. It must never say so of one that might still write."""

import os
import select
import threading


class Death:
    """Of the process with this pid; 0 for one that cannot be seen, which is never known to be dead.

    Any thread may ask, also while another closes it.
    """

    def __init__(self, pid: int):
        self._lock = threading.Lock()
        """Held while the descriptor is in use: a closed one may stand for something else."""
        self._fd = -1
        if pid > 0:
            try:
                self._fd = os.pidfd_open(pid)
            except OSError:
                self._fd = -1

    def known(self, within_seconds: float = 0.0) -> bool:
        """Whether it has died, waiting for that a little. False once closed."""
        with self._lock:
            if self._fd < 0:
                return False
            watcher = select.poll()
            watcher.register(self._fd, select.POLLIN)
            return bool(watcher.poll(within_seconds * 1000))

    def close(self) -> None:
        """Look no more. Idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
