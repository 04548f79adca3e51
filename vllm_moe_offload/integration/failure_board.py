"""Memory in which the ranks of one host show each other which requests of a step have failed.

A rank writes before it contributes to what the others compute from: its part of an all-reduce, or the tensors it sends
to the next pipeline stage. Whoever has the step's result has therefore received everything that was written for it,
without a message or a barrier of the board's own.
"""

import mmap
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

STEPS = 64
"""A rank may be so many steps ahead of the one that reads: more than vLLM ever has in flight."""
_REASON_BYTES = 1000
_ENTRIES_AT = 4096
"""Before it there is a byte for each rank."""
_FOLDER = "/dev/shm"


class FailureBoard:
    """One row per rank, each written by its rank alone.

    Args:
        memory: ``board_bytes(ranks, requests)`` bytes, zero at first, that all ranks have mapped.
        rank: whose row ``post`` writes.
        requests: the most that one step schedules.
    """

    def __init__(self, memory: mmap.mmap, ranks: int, rank: int, requests: int):
        self._late = np.frombuffer(memory, dtype=np.bool_, count=ranks)
        self._rank = rank
        entries = np.frombuffer(memory, dtype=_entry(requests), offset=_ENTRIES_AT, count=ranks * STEPS)
        entries = entries.reshape(ranks, STEPS)
        self._own = entries[rank]
        self._step, self._reason, self._failed = entries["step"], entries["reason"], entries["failed"]

    def announce_late(self) -> None:
        """This rank may post failures of a step after it has contributed to it. Said before the first step."""
        self._late[self._rank] = True

    @property
    def may_be_late(self) -> bool:
        """Whether any rank has said so: then its posts are complete only once it has ended the step."""
        return bool(self._late.any())

    def post(self, step: int, requests: Iterable[int], reason: str) -> None:
        """``requests`` of ``step`` (positions among those scheduled; steps count from 1) have failed on this rank."""
        entry = self._own[step % STEPS]
        if entry["step"] != step:
            entry["step"] = 0
            entry["failed"][:] = False
            entry["reason"] = reason.encode()[:_REASON_BYTES]
        entry["failed"][list(requests)] = True
        entry["step"] = step

    def read(self, step: int) -> dict[int, str]:
        """The requests of ``step`` that have failed on any rank, with the reason of one of the ranks."""
        place = step % STEPS
        ranks = np.flatnonzero(self._step[:, place] == step)
        failed: dict[int, str] = {}
        for rank in ranks.tolist():
            reason = bytes(self._reason[rank, place]).decode(errors="replace")
            failed |= dict.fromkeys(np.flatnonzero(self._failed[rank, place]).tolist(), reason)
        return failed


def board_bytes(ranks: int, requests: int) -> int:
    """The size of a board's memory."""
    assert ranks <= _ENTRIES_AT
    return _ENTRIES_AT + ranks * STEPS * _entry(requests).itemsize


def create_board_file(size: int) -> Path:
    """A file of ``size`` zero bytes that only this user may open, its memory reserved.

    Raises:
        OSError: there is no room, or no shared memory.
    """
    descriptor, name = tempfile.mkstemp(prefix="moe-offload-failures-", dir=_FOLDER)
    path = Path(name)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)
    return path


def map_board_file(path: Path, size: int) -> mmap.mmap | None:
    """The memory behind a board file; None where this process cannot reach it, as on another host."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if status.st_uid == os.geteuid() and status.st_size == size:
                return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    return None


def _entry(requests: int) -> np.dtype[np.void]:
    return np.dtype(
        [("step", np.int64), ("reason", f"S{_REASON_BYTES}"), ("failed", np.bool_, (requests,))], align=True
    )
