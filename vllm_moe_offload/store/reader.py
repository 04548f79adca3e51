"""An open, complete store: where each record lies and what it must hash to.

Must never be built on a folder that is not entirely what its manifest says and what the caller asked for.
"""

import os
from collections.abc import Callable
from pathlib import Path

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store import manifest
from vllm_moe_offload.store.direct import aligned_buffer, open_direct
from vllm_moe_offload.store.files import explained
from vllm_moe_offload.store.identity import StoreIdentity
from vllm_moe_offload.store.layout import record_digest
from vllm_moe_offload.store.ownership import require_trusted

VERIFY_BYTES = 8 << 20


class UnusableStoreError(StoreError):
    """What lies at a store's place is cut short, damaged, foreign or of another format, and may be rebuilt."""


class Store:
    """The records of one model, open for reading for as long as this object; unlinking the files does not hurt it.

    `fd` reads the record file, with O_DIRECT if `direct` (then buffers, offsets and sizes are multiples of
    `ALIGNMENT`). `layers` are in the order they were written; a layer index counts in it.
    """

    record_digest = staticmethod(record_digest)

    def __init__(self, path: Path, contents: manifest.Manifest, fd: int, direct: bool):
        self.path = path
        self.identity = StoreIdentity(contents.facts, contents.model)
        self.layers = contents.layers
        self.data_bytes = contents.data_bytes
        self.fd = fd
        self.direct = direct

    @classmethod
    def open(cls, path: Path, identity: StoreIdentity | None = None) -> "Store":
        """Open the store in folder `path` if it is whole and, given `identity`, built for exactly that.

        Raises UnusableStoreError if it must be rebuilt, StoreError if it cannot be read at all or is not trusted.
        """
        with explained("read the store", path):
            try:
                text = _read_trusted(path, path / manifest.MANIFEST_NAME)
                contents = _decode(path, text, identity)
                fd, direct = open_direct(path / manifest.RECORDS_NAME, os.O_RDONLY)
            except FileNotFoundError as error:
                raise UnusableStoreError(f"store {path} is incomplete: {error.filename} is missing") from error
        try:
            status = os.fstat(fd)
            require_trusted(path, status, path.parent)
            if status.st_size != contents.data_bytes:
                raise UnusableStoreError(
                    f"store {path} cannot be used: {manifest.RECORDS_NAME} has {status.st_size} bytes, "
                    f"not {contents.data_bytes}"
                )
        except BaseException:
            os.close(fd)
            raise
        return cls(path, contents, fd, direct)

    def offset(self, layer_index: int, expert: int) -> int:
        """Byte offset of a record in the record file."""
        layer = self.layers[layer_index]
        assert 0 <= expert < layer.experts
        return layer.offset + expert * layer.layout.record_bytes

    def checksum(self, layer_index: int, expert: int) -> int:
        """What `record_digest` of the record's component payloads must be."""
        return self.layers[layer_index].checksums[expert]

    def verify(self, progress: Callable[[int], None] | None = None) -> list[tuple[str, int]]:
        """Read everything; returns (layer name, expert) of each damaged or unreadable record, in file order.

        `progress` is called with the number of bytes checked so far.
        """
        damaged = []
        for layer in self.layers:
            size = layer.layout.record_bytes
            step = max(1, VERIFY_BYTES // size)
            buffer = aligned_buffer(step * size)
            for first in range(0, layer.experts, step):
                experts = range(first, min(first + step, layer.experts))
                records = memoryview(buffer)[: len(experts) * size]
                readable = self._read(records, layer.offset + first * size)
                for at, expert in enumerate(experts):
                    record = records[at * size : (at + 1) * size]
                    whole = (at + 1) * size <= readable
                    if not whole or record_digest(layer.layout.parts(record)) != layer.checksums[expert]:
                        damaged.append((layer.name, expert))
                if progress is not None:
                    progress(layer.offset + experts.stop * size)
        return damaged

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def _read(self, into: memoryview, offset: int) -> int:
        """Bytes read before the end of the file or an unreadable place."""
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self.fd, [into[done:]], offset + done)
            except OSError:
                break
            if got == 0:
                break
            done += got
        return done


def _read_trusted(store: Path, file_path: Path) -> bytes:
    with file_path.open("rb") as file:
        require_trusted(store, os.fstat(file.fileno()), store.parent)
        return file.read()


def _decode(store: Path, text: bytes, identity: StoreIdentity | None) -> manifest.Manifest:
    try:
        contents = manifest.decode(text)
        _check_identity(contents, identity)
    except StoreError as error:
        raise UnusableStoreError(f"store {store} cannot be used: {error}") from error
    return contents


def _check_identity(contents: manifest.Manifest, identity: StoreIdentity | None) -> None:
    if identity is None:
        return
    differing = identity.differences(StoreIdentity(contents.facts))
    if differing:
        raise StoreError(f"it was built for something else, differing in {', '.join(differing)}")
