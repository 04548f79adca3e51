"""Arrays out of an ``.npz`` that may be damaged: it never costs more memory than the file's size allows.

Whatever is wrong with the content is a ``ValueError``. An ``OSError`` or ``MemoryError`` says nothing about it: the
same file may be readable a moment later.
"""

import errno
import math
import struct
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

_MOST_INFLATED = 1040
"""A deflated byte never becomes more bytes than this (1032, and some for very short streams)."""
_LONGEST_HEADER = 1000
"""Characters; a longer one could exhaust the interpreter's stack while it is parsed."""
_KINDS = "biufUS"
_END_RECORD = struct.Struct("<4s4H2LH")


class ArrayOutline(NamedTuple):
    """What an array is, as far as its header says."""

    shape: tuple[int, ...]
    dtype: np.dtype


class NpzReader:
    """An open ``.npz``.

    Args:
        file: seekable; stays the caller's.

    Raises:
        ValueError: it is none, or its directory is damaged.
        OSError, MemoryError: it cannot be read at present.
    """

    def __init__(self, file: IO[bytes]):
        with _damage_as_value_error():
            self._size = file.seek(0, 2)
            file.seek(0)
            if file.read(2) != b"PK" or not zipfile.is_zipfile(file):  # a zip file may have anything before it
                raise ValueError("not an npz, or cut short")
            self._archive = zipfile.ZipFile(file)
            if _stated_members(file, self._size) not in (None, len(self._archive.infolist())):
                raise ValueError("its directory is incomplete")
            self._members = {info.filename.removesuffix(".npy"): info for info in self._archive.infolist()}

    @property
    def names(self) -> Collection[str]:
        return self._members.keys()

    def outline(self, name: str) -> ArrayOutline:
        """Shape and type of an array without reading it; its size is that of the member, so neither can be far off.

        Raises as ``read`` does.
        """
        info = self._members[name]
        with _damage_as_value_error(), self._archive.open(info) as member:
            return self._checked_header(member, info)

    def read(self, name: str) -> NDArray:
        """One array.

        Raises:
            KeyError: there is none of this name.
            ValueError: it is damaged, or of a type that no field of ours has.
            OSError, MemoryError: it cannot be read at present.
        """
        info = self._members[name]
        with _damage_as_value_error():
            with self._archive.open(info) as member:
                self._checked_header(member, info)
            with self._archive.open(info) as member:
                array: NDArray = np.lib.format.read_array(member, allow_pickle=False)
                if member.read(1):  # reaching the end is what compares the checksum
                    raise ValueError("more bytes than its shape says")
                return array

    def _checked_header(self, member: IO[bytes], info: zipfile.ZipInfo) -> ArrayOutline:
        version = np.lib.format.read_magic(member)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"npy version {version}")
        shape, _, dtype = readers[version](member, max_header_size=_LONGEST_HEADER)  # type: ignore[call-arg]
        if dtype.kind not in _KINDS:
            raise ValueError(f"an array of {dtype}")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != info.file_size - member.tell():
            raise ValueError(f"{info.file_size} bytes for {dtype} of shape {shape}")
        inflated = 1 if info.compress_type == zipfile.ZIP_STORED else _MOST_INFLATED
        if info.compress_size > self._size or info.file_size > inflated * info.compress_size:
            raise ValueError(f"{info.file_size} bytes in a file of {self._size}")
        return ArrayOutline(tuple(shape), dtype)


def read_arrays(file: IO[bytes]) -> dict[str, NDArray]:
    """All arrays of an ``.npz``. Raises as ``NpzReader`` does."""
    reader = NpzReader(file)
    return {name: reader.read(name) for name in reader.names}


def _stated_members(file: IO[bytes], size: int) -> int | None:
    """How many members there are by the last record of a zip file; None if a comment follows it."""
    file.seek(size - _END_RECORD.size)
    signature, _, _, _, members, _, _, _ = _END_RECORD.unpack(file.read(_END_RECORD.size))
    return members if signature == b"PK\5\6" else None


@contextmanager
def _damage_as_value_error() -> Iterator[None]:
    """The libraries that parse damaged bytes raise nearly every exception there is; a wrong offset is an EINVAL."""
    try:
        yield
    except (ValueError, MemoryError):
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError(f"wrong offsets ({error})") from error
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
