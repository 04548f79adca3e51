"""The place where the daemon of a host is found, and the right to be that daemon.

A lock file beside the socket decides who serves: it is held with flock for as long as a daemon has anything to free,
and never removed. Only its holder may touch the socket, and only one that is a socket, the user's own, and dead.
"""

import errno
import grp
import logging
import os
import socket
import stat
import time
from pathlib import Path

from ..errors import ConfigError
from ..ipc.address import make_folder
from ..store.files import try_lock

logger = logging.getLogger(__name__)

BACKLOG = 128
LONGEST_PATH = 107
PATIENCE_SECONDS = 45.0
"""How long a daemon that is leaving is waited for: it may be writing histories."""

_RETRY_SECONDS = 0.05


def find_group(name: str) -> int:
    """The number of a group.

    Raises:
        ConfigError: this machine has no such group.
    """
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(
            f"--group {name}: there is no such group on this machine; `getent group` lists them"
        ) from None


class SocketFile:
    """A listening socket at a path, and the lock that goes with it; see ``claim``."""

    def __init__(self, path: Path, listener: socket.socket, lock: int) -> None:
        self.path = path
        self.listener = listener
        self._lock = lock
        self._inode = path.lstat().st_ino

    @classmethod
    def claim(cls, path: Path, group: int | None, patience: float = PATIENCE_SECONDS) -> "SocketFile":
        """Listen at ``path``, for this user and the members of ``group``.

        Waits up to ``patience`` seconds for a daemon that holds the place without answering: it is about to leave.

        Raises:
            ConfigError: a daemon serves there already (its pid is named), or the place cannot be had.
        """
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise ConfigError(f"--socket {path}: longer than the {LONGEST_PATH} bytes a socket's path can have")
        make_folder(path, group)
        if group is not None and (closed := _closed_to(group, path.parent.resolve())) is not None:
            logger.warning(
                "members of group %d cannot enter %s, so they will not find the daemon; chmod o+x %s",
                group,
                closed,
                closed,
            )
        lock = _lock(path, patience)
        try:
            if _remove_dead(path):
                logger.info("removed %s, which a daemon that died had left", path)
            listener = _listen(path, group)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, listener, lock)

    def remove(self) -> None:
        """Nobody finds the daemon any more; the place stays taken. Leaves alone what somebody else put there."""
        self.listener.close()
        try:
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()
        except FileNotFoundError:
            return

    def release(self) -> None:
        """Another daemon may have the place."""
        self.remove()
        os.close(self._lock)


def lock_path(path: Path) -> Path:
    """The lock that belongs to a socket."""
    return path.with_name(f"{path.name}.lock")


def _closed_to(group: int, folder: Path) -> Path | None:
    """The first folder on the way to ``folder`` that members of ``group`` cannot enter, as far as modes say."""
    for each in (*reversed(folder.parents), folder):
        status = each.stat()
        if not status.st_mode & (stat.S_IXGRP if status.st_gid == group else stat.S_IXOTH):
            return each
    return None


def _lock(path: Path, patience: float) -> int:
    """The descriptor that holds the lock of ``path``."""
    file = lock_path(path)
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"--socket {path}: cannot open {file}: {error.strerror}") from None
    status = os.fstat(lock)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(lock)
        raise ConfigError(f"--socket {path}: {file} is not a file of this user; name a socket elsewhere")
    deadline, waits = time.monotonic() + patience, False
    while not try_lock(lock):
        serving = _someone_listens(path)
        holder = os.pread(lock, 20, 0).decode(errors="replace") or "unknown"
        if serving or time.monotonic() > deadline:
            os.close(lock)
            state = "already serves" if serving else "neither serves nor leaves"
            raise ConfigError(
                f"--socket {path}: a daemon (pid {holder}) {state} there; use it, end it with "
                f"`vllm-moe-offload daemon stop --socket {path}`, or name another socket"
            )
        if not waits:
            waits = True
            logger.info("waiting for a daemon (pid %s) that is leaving %s", holder, path)
        time.sleep(_RETRY_SECONDS)
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def _someone_listens(path: Path) -> bool:
    """Whether a process has the socket open; anything but the kernel's plain no counts as yes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)


def _remove_dead(path: Path) -> bool:
    """Remove the socket a dead daemon left, if there is one; the lock must be held."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
        raise ConfigError(f"--socket {path}: is there already and no socket of this user; name another socket")
    if _someone_listens(path):
        raise ConfigError(f"--socket {path}: another program, no daemon of ours, listens there; name another socket")
    path.unlink()
    return True


def _listen(path: Path, group: int | None) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        if group is not None:
            os.chown(path, -1, group)
            path.chmod(0o660)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"--socket {path}: cannot listen there: {error.strerror}") from None
    finally:
        os.umask(before)
    return listener
