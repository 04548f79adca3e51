"""Files of requests' contents: readable by their owner alone, replaced whole, and written by one process at a time."""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

_RETRY_SECONDS = 0.02


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


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
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
    _sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files for ``path`` that nobody is writing any more."""
    for leftover in (*path.parent.glob(f".{path.name}.*.tmp"), *path.parent.glob(f"{path.name}.*.tmp")):
        with contextlib.suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _lock_now(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has been locked by another process for {seconds:g} s")
        time.sleep(_RETRY_SECONDS)


def _lock_now(descriptor: int, path: Path) -> bool:
    """Whether the lock is ours, and that of the file at ``path``: one that was removed meanwhile excludes nobody."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is_at(descriptor, path)


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
                with contextlib.suppress(OSError):  # a file system without locks: leftovers stay there
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                if _is_at(descriptor, temporary):
                    yield file, temporary
                    return
            finally:
                temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
