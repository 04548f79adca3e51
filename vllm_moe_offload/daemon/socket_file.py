"""The place where the daemon of a host is found, and the right to be that daemon.

A lock file beside the socket decides who serves: it is held with flock for as long as a daemon has anything to free,
and never removed. Only its holder may touch the socket, and only one that is a socket, the user's own, and dead.
"""

import errno
import grp
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError
from ..store.files import try_lock
from .trust import writable_by_others

BACKLOG = 128
LONGEST_PATH = 107
PATIENCE_SECONDS = 45.0
"""How long a daemon that is leaving is waited for: it may be writing histories."""

_RETRY_SECONDS = 0.05


def default_socket_path() -> Path:
    """``$XDG_RUNTIME_DIR/vllm-moe-offload.sock``, else ``daemon.sock`` in a folder of the user's own below ``/tmp``.

    A runtime folder that is not there, is another user's (as after ``su``), or can be written by others does not count.

    Raises:
        ConfigError: somebody else made the folder below ``/tmp``, or can write to it.
    """
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime.is_absolute() and _is_own(runtime):
        return runtime / "vllm-moe-offload.sock"
    folder = Path("/tmp") / f"vllm-moe-offload-{os.geteuid()}"
    if os.path.lexists(folder):
        _check_private(folder)
    return folder / "daemon.sock"


def make_folder(path: Path, group: int | None = None) -> None:
    """Make the folder of a socket where there is none, for this user and for members of ``group`` to enter.

    Raises:
        ConfigError: it cannot be made, or is one where others could replace the socket.
    """
    folder = path.parent
    try:
        folder.mkdir(mode=0o700)
        if group is not None:
            os.chown(folder, -1, group)
            folder.chmod(0o710)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"--socket {path}: cannot make its folder: {error.strerror}") from None
    try:
        status = folder.stat()
    except OSError as error:
        raise ConfigError(f"--socket {path}: cannot look at its folder: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or writable_by_others(status, {0, os.geteuid()}):
        raise ConfigError(
            f"--socket {path}: others than this user and root can write in {folder} ({_whose(status)}) and could pose "
            "as the daemon; take their right to write away, or name a socket in a folder of this user"
        )


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
    def claim(
        cls, path: Path, group: int | None, say: Callable[[str], None], patience: float = PATIENCE_SECONDS
    ) -> "SocketFile":
        """Listen at ``path``, for this user and the members of ``group``.

        Waits up to ``patience`` seconds for a daemon that holds the place without answering: it is about to leave.

        Raises:
            ConfigError: a daemon serves there already (its pid is named), or the place cannot be had.
        """
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise ConfigError(f"--socket {path}: longer than the {LONGEST_PATH} bytes a socket's path can have")
        make_folder(path, group)
        if group is not None and (closed := _closed_to(group, path.parent.resolve())) is not None:
            say(f"members of group {group} cannot enter {closed}, so they will not find the daemon; chmod o+x {closed}")
        lock = _lock(path, patience, say)
        try:
            if _remove_dead(path):
                say(f"removed {path}, which a daemon that died had left")
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


def _is_own(folder: Path) -> bool:
    """Whether it is a folder of this user in which nobody else can write."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _closed_to(group: int, folder: Path) -> Path | None:
    """The first folder on the way to ``folder`` that members of ``group`` cannot enter, as far as modes say."""
    for each in (*reversed(folder.parents), folder):
        status = each.stat()
        if not status.st_mode & (stat.S_IXGRP if status.st_gid == group else stat.S_IXOTH):
            return each
    return None


def _check_private(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"{folder}: is not a folder of this user alone ({_whose(status)}): somebody else could pose as the daemon; "
            "remove it, set XDG_RUNTIME_DIR, or name a socket elsewhere"
        )


def _whose(status: os.stat_result) -> str:
    return f"owner {status.st_uid}, {stat.filemode(status.st_mode)}"


def _lock(path: Path, patience: float, say: Callable[[str], None]) -> int:
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
            say(f"waiting for a daemon (pid {holder}) that is leaving {path}")
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
