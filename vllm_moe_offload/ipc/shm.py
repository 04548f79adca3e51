"""Anonymous shared memory at an address that stays: made here, handed on as a file descriptor, mapped over in place.

Arrays over a mapping keep it alive, so memory is never unmapped under a reader. It must never map memory whose size
a peer could still change: reading past the end of a file that shrank kills the process.
"""

import ctypes
import fcntl
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import ConfigError, OffloadError
from ..pool.huge_pages import HUGE_PAGE_BYTES, shared_page_bytes
from ..sizes import size_text

NAME_PREFIX = "moe-offload:"
"""Of every memfd of this package; ``/proc/PID/maps`` shows ``/memfd:moe-offload:…``."""

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""Nobody can change the size of a memfd that has them."""

_SEALS = {name: getattr(fcntl, name) for name in ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE", "F_SEAL_SEAL")}
_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23
_FALLOC_KEEP_SIZE = 0x1
_FALLOC_PUNCH_HOLE = 0x2
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class PeerMemoryError(OffloadError, ValueError):
    """A descriptor that came from a peer is not the memory it was announced as."""


def whole_pages(nbytes: int) -> int:
    """``nbytes`` rounded up to pages, at least one."""
    return max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE


class Mapping:
    """A memfd seen at a fixed address. Make one with ``create`` or ``attach``.

    Memory is unmapped when the mapping and every array over it are gone. The descriptor is closed by ``close``.
    """

    def __init__(self, fd: int, size: int, writable: bool):
        self.fd = fd
        self.size = size
        self.writable = writable
        """Whether this process may write it; a write to memory that is not kills the process."""
        self.large_page_bytes = shared_page_bytes() if writable else 0
        """The smallest of the large pages that ``allocate`` can take; 0 if there are only small ones."""
        self._taking = threading.Lock()
        self.address = _reserve(size)
        weakref.finalize(self, _libc.munmap, self.address, size).atexit = False
        self._map_over(writable, mmap.MAP_SHARED, fd)

    @classmethod
    def create(cls, name: str, nbytes: int) -> "Mapping":
        """New zeroed memory of at least ``nbytes``, shared, writable, of a size nobody can change any more.

        Pages are taken from the system when they are first written or ``allocate``d.

        Raises:
            ConfigError: the system has no descriptor or address space left for it.
        """
        size = whole_pages(nbytes)
        fd = -1
        try:
            fd = os.memfd_create(NAME_PREFIX + name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            # Someone of the daemon's group who was sent a read-only descriptor must not reopen it for writing.
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SIZE_SEALS | fcntl.F_SEAL_SEAL)
            return cls(fd, size, writable=True)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise _no_room(f"shared memory {name}", size, error) from error

    @classmethod
    def attach(cls, fd: int, nbytes: int, writable: bool) -> "Mapping":
        """Map what a peer sent. Takes ``fd`` over, also when it fails.

        Raises:
            PeerMemoryError: it is no sealed memfd of ``whole_pages(nbytes)`` bytes, or not open for this use.
            ConfigError: the system has no address space left for it.
        """
        size = whole_pages(nbytes)
        try:
            check_descriptor(fd, size)
            return cls(fd, size, writable)
        except PermissionError as error:
            os.close(fd)
            raise PeerMemoryError(f"descriptor {fd} is not open for {'writing' if writable else 'reading'}") from error
        except OSError as error:
            os.close(fd)
            raise _no_room("memory of a peer", size, error) from error
        except PeerMemoryError:
            os.close(fd)
            raise

    def array(self, offset: int, dtype: DTypeLike, shape: Sequence[int]) -> NDArray[Any]:
        """A dense array over the bytes from ``offset`` on. It is marked writable even where the memory is not, since
        the memory may become so.

        Raises:
            ValueError: it would not lie inside the mapping.
        """
        kind = np.dtype(dtype)
        if offset < 0 or offset + kind.itemsize * int(np.prod(shape, dtype=np.int64)) > self.size:
            raise ValueError(f"an array {list(shape)} of {kind} at {offset} is not inside {self.size} bytes")
        return np.asarray(_Span(self, self.address + offset, kind, shape))

    def become_private(self) -> None:
        """From now on this process writes what it likes and nobody sees it. Contents, addresses and arrays stay.

        Pages are copied when first written, and cost memory twice from then on: the shared ones stay, those of holes
        too. Until then they show what others write into the shared ones.
        """
        # The whole range may be larger than memory: only what is written counts.
        self._map_over(writable=True, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, fd=self.fd)

    def replace(self, fd: int) -> None:
        """Show another memfd of the same size, shared and read-only, at the same address. Takes ``fd`` over.

        Raises:
            PeerMemoryError: as in ``attach``; the mapping is as before.
            ConfigError: the system refuses the mapping, and may have removed the one before.
        """
        try:
            check_descriptor(fd, self.size)
            self._map_over(writable=False, flags=mmap.MAP_SHARED, fd=fd)
        except PermissionError as error:
            os.close(fd)
            raise PeerMemoryError(f"descriptor {fd} is not open for reading") from error
        except OSError as error:
            os.close(fd)
            raise _no_room("memory of a peer", self.size, error) from error
        except PeerMemoryError:
            os.close(fd)
            raise
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = fd

    def allocate(self, offset: int, nbytes: int) -> None:
        """Take the pages of a range now, where their lack is an error; later it would end the process.

        They are as large as the kernel has them and as lie inside the range: no memory is taken outside of it, and
        ``punch`` of the range gives all of it back.

        Raises:
            ConfigError: the system has not enough memory; the range may be empty then.
        """
        if self.large_page_bytes and not self._take_large_pages(offset, nbytes):
            self.punch(offset, nbytes)  # or the rest of the process would have to do without the memory it got
        try:
            os.posix_fallocate(self.fd, offset, nbytes)
        except OSError as error:
            raise _no_room("shared memory", nbytes, error) from error

    def punch(self, offset: int, nbytes: int) -> None:
        """Give the whole pages of a range back to the system, for every process that maps it; the range reads as zero.

        Raises:
            OSError: the descriptor is not open for writing.
        """
        if _libc.fallocate(self.fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, nbytes):
            raise _system_error("fallocate")

    def reader_descriptor(self) -> int:
        """A new descriptor of the same memory that cannot be written through; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the descriptor; what is mapped stays mapped. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _map_over(self, writable: bool, flags: int, fd: int) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        _map(self.address, self.size, protection, flags | _MAP_FIXED, fd)
        # Otherwise the kernel may give, or later make, huge pages that reach into slots which hold nothing. One
        # that has no huge pages refuses the advice.
        self._advise(mmap.MADV_NOHUGEPAGE, 0, self.size)
        self.writable = writable

    def _take_large_pages(self, offset: int, nbytes: int) -> bool:
        """Fill a range. Returns whether there was memory for all of it, and a kernel that can."""
        page = mmap.PAGESIZE
        first, last = -(-offset // page) * page, (offset + nbytes) // page * page
        if first < last:
            with self._taking:  # neighbours advised at the same time would share a large page
                self._advise(mmap.MADV_HUGEPAGE, first, last)
                filled = self._advise(_MADV_POPULATE_WRITE, first, last)
                self._advise(mmap.MADV_NOHUGEPAGE, first, last)
            if not filled:
                return False
        # The ends, which neighbours share, in small pages: fallocate may take large ones without being advised to.
        return self._advise(_MADV_POPULATE_WRITE, offset // page * page, whole_pages(offset + nbytes))

    def _advise(self, advice: int, first: int, last: int) -> bool:
        return _libc.madvise(self.address + first, last - first, advice) == 0


class _Span:
    """What numpy needs to see memory as an array; the array holds on to it, and it to the mapping."""

    def __init__(self, mapping: Mapping, address: int, dtype: np.dtype[Any], shape: Sequence[int]):
        self.mapping = mapping
        self.__array_interface__ = {"version": 3, "data": (address, False), "typestr": dtype.str, "shape": tuple(shape)}


def check_descriptor(fd: int, size: int, seals: int = SIZE_SEALS) -> None:
    """Make sure that a descriptor from a peer has ``size`` bytes for ever.

    Args:
        seals: of the memfd; more do no harm.

    Raises:
        PeerMemoryError: it has not.
    """
    # First: only memory has seals, and without them the size may be another one already.
    try:
        found = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        status = os.fstat(fd)
    except OSError as error:
        raise PeerMemoryError(f"descriptor {fd} is no memfd: {error.strerror}") from error
    if found & seals != seals:
        missing = ", ".join(name for name, seal in _SEALS.items() if seals & ~found & seal)
        raise PeerMemoryError(f"descriptor {fd} lacks the seals {missing}")
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        raise PeerMemoryError(f"descriptor {fd} has {status.st_size} bytes where {size} were announced")


def _reserve(size: int) -> int:
    """Addresses for ``size`` bytes, from where huge pages can begin."""
    room = _map(None, size + HUGE_PAGE_BYTES, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    address = -(-room // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    before, after = address - room, room + HUGE_PAGE_BYTES - address
    if before:
        _libc.munmap(room, before)
    if after:
        _libc.munmap(address + size, after)
    return address


def _map(address: int | None, size: int, protection: int, flags: int, fd: int = -1) -> int:
    mapped = _libc.mmap(address, size, protection, flags, fd, 0)
    if mapped is None or mapped == _FAILED:
        raise _system_error("mmap")
    return int(mapped)


def _system_error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def _no_room(what: str, nbytes: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"no room for {what} of {size_text(nbytes)} ({error.strerror}); give the daemon a smaller --cache, "
        "or raise the memory limit (ulimit, container) it runs under"
    )
