"""Starts a daemon for an engine that found none. The daemon is nobody's child: it outlives the engine that started it.

Engines may do this at the same moment: they take turns, by a lock on the log, and the later ones find a daemon. Should
someone else start one meanwhile, the socket's own lock decides which of them stays, and all use that one.
"""

import contextlib
import os
import select
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..ipc.address import make_folder
from ..store.files import try_lock
from .connection import Connection, DaemonGoneError

LAST_LINES = 8

_RETRY_SECONDS = 0.05
# Ends at once, so that its child belongs to init: engines are ended together with all their descendants.
_LAUNCHER = """
import os, sys
if os.fork() == 0:
    os.setsid()
    try:
        os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
    except OSError:  # the daemon then runs where this process may
        pass
    os.execv(sys.argv[2], sys.argv[2:])
"""


class StartError(ConfigError):
    """The daemon that was started did not come to serve; with the last lines it wrote."""


def log_path(path: Path) -> Path:
    """Where a daemon started for the socket ``path`` writes what it has to say."""
    return path.with_name(f"{path.name}.log")


def start_daemon(
    path: Path,
    cache: str,
    leave_after: float,
    options: Sequence[str] = (),
    timeout: float = 60,
    cpus: set[int] | None = None,
) -> int:
    """Make sure that a daemon serves at ``path``: the one that does already, or else a new one.

    Args:
        path: of the socket.
        cache: memory for experts, like ``32GiB``.
        leave_after: seconds without engines after which it leaves.
        options: more of what ``vllm-moe-offload daemon`` understands, with absolute paths.
        timeout: seconds until it must answer.
        cpus: where a new daemon runs; None for where the caller does, which may be a single processor.

    Returns:
        The daemon's pid.

    Raises:
        StartError: it ended, or does not answer in time.
        RefusedError: the daemon that answers is of another version, or another user's.
        ConfigError: the socket's folder cannot be made or written.
    """
    path = path.absolute()
    make_folder(path)
    turn = _open_log(path)
    try:
        running = _wait_for_turn(path, turn, timeout)
        options = ["--cache", cache, "--leave-after", str(leave_after), *options]
        return running or _start(path, options, timeout, cpus or os.sched_getaffinity(0))
    finally:
        os.close(turn)


def _wait_for_turn(path: Path, turn: int, timeout: float) -> int | None:
    """Until a daemon answers, whose pid is returned, or until it is for this engine alone to start one."""
    deadline = time.monotonic() + timeout
    while True:
        is_ours = try_lock(turn)
        with contextlib.suppress(DaemonGoneError):
            return _ask(path, timeout)
        if is_ours:
            return None
        if time.monotonic() > deadline:
            raise StartError(f"another engine has tried to start a daemon for {path} for {timeout:g} s")
        time.sleep(_RETRY_SECONDS)


def _start(path: Path, options: Sequence[str], timeout: float, cpus: set[int]) -> int:
    log = _open_log(path)
    try:
        said_before = os.fstat(log).st_size
        command = [sys.executable, "-P", "-m", "vllm_moe_offload", "daemon", "--socket", str(path), *options]
        alive = _launch(command, log, cpus)
    finally:
        os.close(log)
    try:
        return _wait_until_it_answers(path, alive, timeout)
    except DaemonGoneError as error:
        raise StartError(f"{error}\n{_last_lines(log_path(path), said_before)}") from None
    finally:
        os.close(alive)


def _ask(path: Path, timeout: float) -> int:
    connection = Connection.connect(path, "control", timeout)
    connection.close()
    return connection.daemon_pid


def _open_log(path: Path) -> int:
    file = log_path(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        log = os.open(file, flags, 0o600)
    except OSError as error:
        raise ConfigError(f"{file}: cannot write the log of a daemon there: {error.strerror}") from None
    status = os.fstat(log)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(log)
        raise ConfigError(f"{file}: is not a file of this user, so no daemon can write its log there; remove it")
    return log


def _launch(command: list[str], log: int, cpus: set[int]) -> int:
    """Run a command detached; the descriptor returned comes to its end when the command does."""
    alive, held = os.pipe()
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, ",".join(map(str, cpus)), *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(held,),
            cwd="/",
            check=True,
        )
    finally:
        os.close(held)
    return alive


def _wait_until_it_answers(path: Path, alive: int, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    life = select.poll()
    life.register(alive, select.POLLIN)
    while True:
        ended = bool(life.poll(_RETRY_SECONDS * 1000))
        left = deadline - time.monotonic()
        try:
            return _ask(path, max(left, _RETRY_SECONDS))
        except DaemonGoneError as error:
            # One that ended left the place to another, which has answered by now if it is well.
            if ended:
                raise DaemonGoneError(f"the daemon that was started for {path} has ended:") from None
            if left <= 0:
                raise DaemonGoneError(
                    f"the daemon that was started does not answer in {timeout:g} s: {error}"
                ) from None


def _last_lines(log: Path, said_before: int) -> str:
    said = log.read_bytes()[said_before:].decode(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in said[-LAST_LINES:]) or f"  (it wrote nothing to {log})"
