"""How fast this machine's disk and memory are, measured. Must leave nothing behind."""

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..store.direct import aligned_buffer, open_direct

FILE_BYTES = 256 << 20
BLOCK_BYTES = 8 << 20
"""About a record of a large model."""
READS_AT_ONCE = 4
COPIED_BYTES = 64 << 20
"""Per thread, larger than caches."""
COPIES = 8
_WRITING_SECONDS = 5.0

Report = Callable[[int], None]
"""Called with bytes that have been moved, from any thread."""


def disk_rate(folder: Path, report: Report, nbytes: int = FILE_BYTES) -> float:
    """Bytes per second that a new file in ``folder`` is read with, several blocks at a time, past the page cache.

    Writing it ends after five seconds, so that a slow disk takes a smaller file.

    Raises:
        OSError: it cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as temporary:
        path = Path(temporary) / "probe"
        blocks = _write(path, nbytes // BLOCK_BYTES, report)
        fd, _ = open_direct(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            buffers = [aligned_buffer(BLOCK_BYTES) for _ in range(READS_AT_ONCE)]

            def read(reader: int) -> None:
                for block in range(reader, blocks, READS_AT_ONCE):
                    report(os.preadv(fd, [buffers[reader]], block * BLOCK_BYTES))

            return blocks * BLOCK_BYTES / _seconds_of(read, READS_AT_ONCE)
        finally:
            os.close(fd)


def _write(path: Path, most: int, report: Report) -> int:
    """Blocks written: ``most``, or as many as there is time for."""
    block = aligned_buffer(BLOCK_BYTES)
    np.frombuffer(block, np.uint64)[:] = np.random.default_rng(0).integers(0, 1 << 63, BLOCK_BYTES // 8, np.uint64)
    fd, _ = open_direct(path, os.O_CREAT | os.O_WRONLY)
    deadline = time.monotonic() + _WRITING_SECONDS
    try:
        written = 0
        while written < most and (not written or time.monotonic() < deadline):
            report(os.pwritev(fd, [block], written * BLOCK_BYTES))
            written += 1
        os.fsync(fd)
        return written
    finally:
        os.close(fd)


def memory_rate(threads: int, report: Report, nbytes: int = COPIED_BYTES) -> float:
    """Bytes per second read and written together by copies of ``nbytes`` on so many threads at once."""
    pairs = [(_filled(nbytes), _filled(nbytes)) for _ in range(threads)]

    def copy(number: int) -> None:
        source, target = pairs[number]
        for _ in range(COPIES):
            np.copyto(target, source)
            report(nbytes)

    return 2 * COPIES * nbytes * threads / _seconds_of(copy, threads)


def _filled(nbytes: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    memory = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    memory.fill(1)
    return memory


def _seconds_of(work: Callable[[int], None], threads: int) -> float:
    """What ``work(0)``, ``work(1)``, … take side by side. Raises what they raise."""
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        for done in [pool.submit(work, number) for number in range(threads)]:
            done.result()
        return max(time.perf_counter() - began, 1e-9)
