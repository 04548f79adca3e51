"""One builder per store among all processes. Must never be held by a process that is gone: the kernel drops a
flock with its owner.
"""

import fcntl
import os
import socket
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TextIO


class BuildLock:
    """An exclusive flock on the file it was acquired on; holds until `release` or the end of the process."""

    def __init__(self, file: TextIO):
        self._file = file

    @classmethod
    def acquire(cls, path: Path, on_wait: Callable[[str], None]) -> "BuildLock":
        """Block until the lock is ours; `on_wait` hears who holds it, at most once per holder. Raises OSError."""
        while True:
            lock = cls.try_acquire(path)
            if lock is not None:
                return lock
            with path.open("a+") as file:
                file.seek(0)
                on_wait(file.read().strip() or "another process")
                fcntl.flock(file, fcntl.LOCK_EX)

    @classmethod
    def try_acquire(cls, path: Path) -> "BuildLock | None":
        """The lock, or None while another process has it."""
        while True:
            file = path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return None
            # `store prune` may have unlinked the file between open and flock: such a lock excludes nobody
            if _is_at(file, path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%H:%M:%S}\n")
                file.flush()
                return cls(file)
            file.close()

    def release(self) -> None:
        self._file.close()


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
