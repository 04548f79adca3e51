"""What `doctor` says of the pages that slots lie in, tried with memory that is given back. It must never raise."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import OffloadError
from ..ipc.shm import Mapping
from ..pool.huge_pages import HUGE_PAGE_BYTES, LARGE_PAGE_BYTES, SETTINGS, private_huge_pages, shared_page_bytes
from ..sizes import size_text
from ..store.direct import aligned_buffer
from .check import OK, WARNING, Check

_TRIED_BYTES = 4 * HUGE_PAGE_BYTES
_FREE_SOME = "the kernel had none free; as root, echo 1 > /proc/sys/vm/compact_memory"


def check_slot_memory() -> Iterator[Check]:
    """Which pages slots lie in. Tried with memory that is gone afterwards."""
    yield check_private_memory()
    yield check_shared_pages()


def check_private_memory() -> Check:
    """Whether an engine's own slots get huge pages."""
    subject = "huge pages"
    buffer = aligned_buffer(_TRIED_BYTES)
    pages = np.frombuffer(buffer, dtype=np.uint8)
    pages[:: mmap.PAGESIZE] = 1
    if _mapped_kib(pages.ctypes.data, "AnonHugePages"):
        return Check(subject, OK, f"{size_text(HUGE_PAGE_BYTES)}, for an engine's own slots")
    slower = f"an engine's own slots get none: a disk takes up to twice as long to read into {_small()} pages"
    allow = f"as root, echo madvise > {SETTINGS}/enabled"
    return Check(subject, WARNING, slower, _FREE_SOME if private_huge_pages() else allow)


def check_shared_pages() -> Check:
    """Whether a daemon's slots get large pages."""
    subject = "shared large pages"
    slower = f"a daemon's slots get none: it takes 1.2 to 1.4 x as long to read a record into {_small()} pages"
    smallest = shared_page_bytes()
    if not smallest:
        return Check(subject, WARNING, slower, f"as root, {_way_out()}, and restart the daemon")
    before = _shared_pages_taken()
    try:
        mapping = Mapping.create("doctor", _TRIED_BYTES)
        mapping.allocate(0, _TRIED_BYTES)
        mapping.close()
    except OffloadError as error:
        return Check(subject, WARNING, str(error), "free some memory")
    if before is not None and _shared_pages_taken() == before:
        return Check(subject, WARNING, slower, _FREE_SOME)
    return Check(subject, OK, f"{size_text(smallest)}, for what is as large of a daemon's slots")


def _way_out() -> str:
    sized = SETTINGS / f"hugepages-{LARGE_PAGE_BYTES >> 10}kB" / "shmem_enabled"
    return f"echo advise > {sized if sized.exists() else SETTINGS / 'shmem_enabled'}"


def _small() -> str:
    return size_text(mmap.PAGESIZE)


def _mapped_kib(address: int, what: str) -> int:
    """A figure of ``/proc/self/smaps`` about the memory that holds ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= address < last
        elif inside and name == f"{what}:":
            return int(rest[0])
    return 0


def _shared_pages_taken() -> int | None:
    """Large pages of shared memory since the machine started; None where the kernel does not count them."""
    counters = list(SETTINGS.glob("hugepages-*kB/stats/shmem_alloc"))
    return sum(int(counter.read_text()) for counter in counters) if counters else None
