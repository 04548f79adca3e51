"""A file that only grows: frames one behind the other, each of them whole or not there, whenever its writer is killed.

``MAGIC``, then frames: a head of payload length, checksum of the payload and checksum of these two; then the payload.
What payloads are is the matter of ``trace_file``.
"""

import contextlib
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from ..store.files import try_lock

MAGIC = b"\x93moe-offload trace 1\n"
_HEAD = struct.Struct("<QI")
_HEAD_CHECKSUM = struct.Struct("<I")
_HEAD_BYTES = _HEAD.size + _HEAD_CHECKSUM.size


class Frame(NamedTuple):
    """One payload, and where its frame ends in the file."""

    payload: bytes
    end: int


def is_log(file: IO[bytes]) -> bool:
    """Whether the file begins as such a file does. Leaves the position behind that."""
    file.seek(0)
    return file.read(len(MAGIC)) == MAGIC


def read_frames(file: IO[bytes]) -> Iterator[Frame]:
    """All whole frames of an open log, one in memory at a time; one that its writer did not finish ends the file.

    A writer that is killed leaves the beginning of a frame; a power failure may leave zeros where the rest belongs.

    Raises:
        ValueError: a frame is damaged, which is not what a writer leaves that is killed, or loses power.
    """
    size, position = file.seek(0, os.SEEK_END), len(MAGIC)
    while size - position >= _HEAD_BYTES:
        file.seek(position)
        head = file.read(_HEAD_BYTES)
        if _HEAD_CHECKSUM.unpack(head[_HEAD.size :])[0] != zlib.crc32(head[: _HEAD.size]):
            if not _is_zero(file):
                raise ValueError(f"damaged at byte {position}")
            return
        length, checksum = _HEAD.unpack(head[: _HEAD.size])
        end = position + _HEAD_BYTES + length
        if end > size:
            return
        payload = file.read(length)
        if zlib.crc32(payload) != checksum:
            if not _is_zero(file):
                raise ValueError(f"damaged between bytes {position} and {end}")
            return
        yield Frame(payload, end)
        position = end


def _is_zero(file: IO[bytes]) -> bool:
    """Whether nothing but zeros is left of the file."""
    while chunk := file.read(1 << 16):
        if any(chunk):
            return False
    return True


def refuse_unwritable(path: Path) -> None:
    """See, without reading or making the file, that a log can be made or continued at ``path`` by who is alone there.

    Raises:
        ValueError: it is something else.
        OSError: it cannot be written.
    """
    if not path.exists():
        with tempfile.TemporaryFile(dir=path.parent):
            return
    with path.open("r+b") as file:
        _refuse_others(file)


def _refuse_others(file: IO[bytes]) -> None:
    """Raises ValueError unless the file is empty, or begins as a log does, perhaps cut short."""
    file.seek(0)
    if not MAGIC.startswith(file.read(len(MAGIC))):
        raise ValueError("it is no trace that can be continued")


class LogWriter:
    """Appends to a log, alone. The file is made, readable by its owner only, if there is none.

    Raises:
        BlockingIOError: another process or engine is writing it.
        ValueError: it is something else, or damaged.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._file = open(descriptor, "r+b", buffering=0)  # noqa: PTH123, SIM115 - of a descriptor, until ``close``
        try:
            if not try_lock(descriptor):
                raise BlockingIOError(f"{path} is being written by another process")
            size = os.fstat(descriptor).st_size
            self.first: bytes | None = None
            """The first payload, if there are any."""
            self.nbytes = 0
            """Of the magic and all whole frames."""
            if is_log(self._file):
                self.nbytes = len(MAGIC)
                for frame in read_frames(self._file):
                    self.first = frame.payload if self.first is None else self.first
                    self.nbytes = frame.end
            else:
                _refuse_others(self._file)
            self.dropped = size - self.nbytes
            """Bytes at the end that an earlier writer had not finished; the next ``append`` replaces them."""
        except BaseException:
            self._file.close()
            raise

    def append(self, payload: bytes) -> None:
        """Add a frame behind the whole ones. Raises OSError, after which the same can be tried again."""
        head = _HEAD.pack(len(payload), zlib.crc32(payload))
        data = memoryview((b"" if self.nbytes else MAGIC) + head + _HEAD_CHECKSUM.pack(zlib.crc32(head)) + payload)
        descriptor, end = self._file.fileno(), self.nbytes
        os.ftruncate(descriptor, end)
        try:
            while data:
                written = os.pwrite(descriptor, data, end)
                data, end = data[written:], end + written
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, self.nbytes)
            raise
        self.nbytes = end

    def close(self) -> None:
        """Have everything on the disk. Raises OSError."""
        with self._file:
            os.fsync(self._file.fileno())
