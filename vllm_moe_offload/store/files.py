"""Files written whole, replaced whole, locked, and system errors put into words.

Must never leave an OSError unexplained that ``explained`` was put around, nor half a file where a whole one was.
"""

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from vllm_moe_offload.errors import ConfigError, StoreError
from vllm_moe_offload.sizes import size_text

ROOT_SETTING = "VLLM_MOE_OFFLOAD_STORE_ROOT"

_RETRY_SECONDS = 0.02

_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the size limit (see `ulimit -f`)",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def named_path(path: Path) -> Path:
    """``path`` as its user means it, a leading ``~`` or ``~user`` replaced by that user's folder.

    Raises:
        ConfigError: there is no such user.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise ConfigError(f"{str(path)!r}: there is no user {path.parts[0].removeprefix('~')!r}") from None


@contextmanager
def explained(action: str, path: Path, need: int = 0) -> Iterator[None]:
    """Turn an OSError into a StoreError with the path, the cause, `need` bytes (0: unknown) and a way out."""
    try:
        yield
    except OSError as error:
        cause = _CAUSES.get(error.errno or 0, error.strerror or str(error))
        place = error.filename if isinstance(error.filename, str) else path
        if error.errno in _FULL:
            raise StoreError(f"cannot {action} at {place}: {cause}{_space(path, need)}; {_MORE_SPACE}") from error
        if error.errno in _CAUSES:
            raise StoreError(
                f"cannot {action} at {place}: {cause} (uid {os.geteuid()}); "
                f"grant access to it, or set {ROOT_SETTING} to a folder this user can write"
            ) from error
        raise StoreError(f"cannot {action} at {place}: {cause}") from error


_MORE_SPACE = f"free space, run `vllm-moe-offload store prune`, or set {ROOT_SETTING} to a folder on a larger disk"


def _space(path: Path, need: int) -> str:
    with suppress(OSError):
        free = free_bytes(path)
        return f" (needs {size_text(need)}, {size_text(free)} free)" if need else f" ({size_text(free)} free)"
    return ""


def free_bytes(path: Path) -> int:
    """Bytes this user may still write below `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def require_space(path: Path, need: int) -> None:
    """Raises StoreError unless `need` bytes are free below `path`."""
    with explained("look for free space", path):
        free = free_bytes(path)
    if free < need:
        raise StoreError(
            f"cannot build the store at {path}: it needs {size_text(need)}, {size_text(free)} are free; {_MORE_SPACE}"
        )


def write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class FileVersion(NamedTuple):
    """Changes whenever a file is replaced or written."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int


def file_version(path: Path) -> FileVersion | None:
    """Of the file that is at ``path`` now; None if there is none. Raises OSError if that cannot be found out."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return FileVersion(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def make_private_folder(path: Path) -> None:
    """Have a folder that only this user can enter; one of this user's that others can enter is closed to them."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        path.chmod(0o700)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk, and rename it over ``path``.

    A crash at any byte leaves the old file or the whole new one. The temporary file of a writer that was killed is
    removed by the next.
    """
    remove_leftovers(path)
    with _temporary_file(path) as (file, temporary):
        write(file)
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)
    sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files for ``path`` that nobody is writing any more."""
    for leftover in (*path.parent.glob(f".{path.name}.*.tmp"), *path.parent.glob(f"{path.name}.*.tmp")):
        with suppress(OSError), leftover.open("rb") as file:
            if try_lock(file.fileno()):
                leftover.unlink()


def set_aside(path: Path, seen: FileVersion | None) -> Path | None:
    """Rename what cannot be used and return its new path; None if it is not the file that was ``seen`` any more."""
    if seen is None or file_version(path) != seen:
        return None
    number = 0
    while (aside := path.with_name(f"{path.name}.unusable-{os.getpid()}-{number}")).exists():
        number += 1
    try:
        return path.rename(aside)
    except FileNotFoundError:
        return None


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock that the file ``path`` stands for, made if need be; the kernel drops it with its owner.

    Raises:
        TimeoutError: another process holds it and does not let go of it in ``seconds``.
        OSError: the file cannot be made or locked.
    """
    deadline = time.monotonic() + seconds
    while (descriptor := try_lock_at(path, _open_private)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has been locked by another process for {seconds:g} s")
        time.sleep(_RETRY_SECONDS)
    try:
        yield
    finally:
        os.close(descriptor)


def try_lock_at(path: Path, open_file: Callable[[Path], int]) -> int | None:
    """Lock the file at ``path``. Returns its descriptor, which holds the lock, or None while another process has it.

    Args:
        open_file: opens it, made if it is missing. Called again where the file was removed before it was locked: such a
            lock excludes nobody.
    """
    while True:
        descriptor = open_file(path)
        ours = False
        try:
            if not try_lock(descriptor):
                return None
            ours = _is_at(descriptor, path)
            if ours:
                return descriptor
        finally:
            if not ours:
                os.close(descriptor)


def try_lock(descriptor: int, shared: bool = False) -> bool:
    """Lock an open file (flock) if nobody else has: for this descriptor, until it is closed in every process.

    Args:
        shared: only an exclusive lock of somebody else is in the way.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(descriptor: int) -> None:
    """As ``try_lock``, waiting until nobody else has it."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def _open_private(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file that only this user can read, removed at the end if it is still there.

    It is locked while it is written, which keeps ``remove_leftovers`` off it.
    """
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - of a descriptor
            try:
                with suppress(OSError):  # a file system without locks: leftovers stay there
                    wait_for_lock(descriptor)
                if _is_at(descriptor, temporary):
                    yield file, temporary
                    return
            finally:
                temporary.unlink(missing_ok=True)
