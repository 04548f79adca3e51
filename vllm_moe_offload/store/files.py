"""Files that bypass the page cache, and system errors put into words. Must never leave an OSError unexplained."""

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_moe_offload.errors import ConfigError, StoreError
from vllm_moe_offload.store.layout import ALIGNMENT

ROOT_SETTING = "VLLM_MOE_OFFLOAD_STORE_ROOT"

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


def size_text(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"


def aligned_buffer(nbytes: int) -> mmap.mmap:
    """Page-aligned, zeroed, private memory, in huge pages where the kernel has them (filling it is 2.5 x as fast)."""
    buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """Open `path` with O_DIRECT, or without where the file system refuses it; returns (fd, direct).

    Some file systems accept the flag and refuse the first transfer, so one aligned block is tried: read, or
    written as zeros when `flags` has O_WRONLY (the file must then have nothing to lose).
    """
    flags |= os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666), False
    transfer = os.pwrite if flags & os.O_WRONLY else _pread
    try:
        transfer(fd, memoryview(aligned_buffer(ALIGNMENT)), 0)
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666), False
    return fd, True


def _pread(fd: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(fd, [buffer], offset)


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
