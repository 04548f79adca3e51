"""The tensors of a safetensors checkpoint, read one at a time without torch: memory stays at one tensor."""

import json
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint and where its bytes are: `start` in bytes from the beginning of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to a routed expert."""
        return ".mlp.experts." in self.name

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Size of a tensor of this dtype and that shape."""
        return int(np.prod(shape)) * ITEM_BYTES[self.dtype]

    def read(self) -> np.ndarray:
        """The tensor's bytes as unsigned integers of its item size, in its shape."""
        kind = np.dtype(f"u{ITEM_BYTES[self.dtype]}")
        with self.file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return np.frombuffer(view, kind, int(np.prod(self.shape)), self.start).reshape(self.shape).copy()


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """All tensors of the folder's safetensors files, file after file."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header: dict[str, Any] = json.loads(opened.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start = 8 + length + entry["data_offsets"][0]
                yield StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, start)


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json."""
    return json.loads((folder / "config.json").read_text())
