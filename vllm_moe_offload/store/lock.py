"""One builder per store among all processes. Must never be held by a process that is gone: the kernel drops a
flock with its owner.
"""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from vllm_moe_offload.store.files import try_lock, try_lock_at, wait_for_lock
from vllm_moe_offload.store.ownership import require_trusted


class BuildLock:
    """An exclusive flock on the file it was acquired on; holds until `release` or the end of the process.

    A lock that another user made is waited for like one's own: flock needs no right to write. In a folder everyone
    can write to, only locks of trusted users count; others' raise StoreError.
    """

    def __init__(self, fd: int):
        self._fd = fd

    @classmethod
    def acquire(cls, path: Path, on_wait: Callable[[str], None]) -> "BuildLock":
        """Block until the lock is ours; `on_wait` hears who holds it, at most once per holder. Raises OSError."""
        while True:
            lock = cls.try_acquire(path)
            if lock is not None:
                return lock
            fd = _open(path)
            try:
                on_wait(os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process")
                wait_for_lock(fd)
            finally:
                os.close(fd)

    @classmethod
    def try_acquire(cls, path: Path) -> "BuildLock | None":
        """The lock, or None while another process has it."""
        fd = try_lock_at(path, _open)  # `store prune` may unlink the file between open and flock
        if fd is None:
            return None
        _sign(fd)
        return cls(fd)

    @staticmethod
    def held(path: Path) -> bool:
        """Whether a process has the lock, or may have: it cannot be looked at. Leaves no trace."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:
            return not try_lock(fd, shared=True)
        finally:
            os.close(fd)

    def release(self) -> None:
        """Let go, once or more often."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _open(path: Path) -> int:
    """Open the lock file, made if it is missing; for reading only where it is another user's. Follows no link.

    Raises OSError, StoreError.
    """
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    except PermissionError:
        try:
            fd = os.open(path, os.O_RDONLY | flags)
        except FileNotFoundError:
            raise PermissionError(13, "Permission denied", str(path)) from None
    try:
        require_trusted(path, os.fstat(fd), path.parent)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _sign(fd: int) -> None:
    """Say in the file who has the lock, where one may write to it."""
    with suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%H:%M:%S}\n".encode(), 0)
