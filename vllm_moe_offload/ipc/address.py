"""Where the daemon of a host is found, and that nobody else can be found there. It must never take a folder in which
others could put a socket of theirs.
"""

import os
import stat
from collections.abc import Container
from pathlib import Path

from ..errors import ConfigError

SHARED = stat.S_IWGRP | stat.S_IWOTH
"""Bits of a mode that let others write."""


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


def writable_by_others(status: os.stat_result, owners: Container[int]) -> bool:
    """Whether users who are not ``owners`` can replace what these put into a folder; in a sticky folder they cannot."""
    return status.st_uid not in owners or bool(status.st_mode & SHARED and not status.st_mode & stat.S_ISVTX)


def _is_own(folder: Path) -> bool:
    """Whether it is a folder of this user in which nobody else can write."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _check_private(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"{folder}: is not a folder of this user alone ({_whose(status)}): somebody else could pose as the daemon; "
            "remove it, set XDG_RUNTIME_DIR, or name a socket elsewhere"
        )


def _whose(status: os.stat_result) -> str:
    return f"owner {status.st_uid}, {stat.filemode(status.st_mode)}"
