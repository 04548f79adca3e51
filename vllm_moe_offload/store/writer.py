"""Builds a store beside its final place and moves it there when every byte is on disk.

Must never leave anything at the final path that is not complete, fill the page cache on the way, nor hold more than one
layer.
"""

import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy import uint8
from numpy.typing import NDArray

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store import manifest
from vllm_moe_offload.store.direct import aligned_buffer, open_direct
from vllm_moe_offload.store.files import explained, require_space, sync_folder, write_synced
from vllm_moe_offload.store.identity import StoreIdentity
from vllm_moe_offload.store.layout import RecordLayout, record_digest
from vllm_moe_offload.store.lock import BuildLock
from vllm_moe_offload.store.manifest import LayerEntry, LayerTensor
from vllm_moe_offload.store.reader import Store

CHUNK_BYTES = 8 << 20


class _LayerBuffer:
    """Page-aligned memory for the records of one layer at a time, as they will lie on disk; zero where nothing was put.

    It is given back as it is written.
    """

    def __init__(self) -> None:
        self._buffer: mmap.mmap | None = None
        self._capacity = 0

    def put(self, layout: RecordLayout, components: Sequence[NDArray[uint8]]) -> memoryview:
        """Copy the `[experts, nbytes]` components into place; returns the layer's `experts * record_bytes` bytes."""
        experts = len(components[0])
        needed = experts * layout.record_bytes
        if self._buffer is None or needed > self._capacity:
            self._buffer = aligned_buffer(needed)
            self._capacity = needed
        records = np.frombuffer(self._buffer, uint8, needed).reshape(experts, layout.record_bytes)
        for start, component, data in zip(layout.offsets, layout.components, components, strict=True):
            records[:, start : start + component.nbytes] = data
        return memoryview(self._buffer)[:needed]

    def give_back(self, start: int, stop: int) -> None:
        """Return the pages of bytes `start` to `stop` to the system; they read as zero from now on."""
        assert self._buffer is not None
        self._buffer.madvise(mmap.MADV_DONTNEED, start, stop - start)


class StoreWriter:
    """Takes the layers of one store in order; `finish` or `abort` ends it and lets waiting processes go on.

    One layer is copied and written by a thread while the caller prepares the next. After a StoreError from any
    method the unfinished store is gone and the writer cannot be used again.

    `progress` may be set by the caller: it is called on the writing thread with the number of bytes written so far.
    """

    def __init__(self, building: Path, final: Path, identity: StoreIdentity, lock: BuildLock):
        """Takes over `lock` and the existing empty folder `building`. Raises StoreError."""
        self.identity = identity
        self.progress: Callable[[int], None] = lambda written: None
        self._building, self._final, self._lock = building, final, lock
        self._fd = -1
        self._total = 0
        self._end = 0
        self._layers: list[LayerEntry] = []
        self._buffer = _LayerBuffer()
        self._thread = ThreadPoolExecutor(1, "store-writer")
        self._in_flight: Future[None] | None = None
        self._open = True
        with self._or_abort():
            self._fd, self.direct = open_direct(building / manifest.RECORDS_NAME, os.O_WRONLY | os.O_CREAT)

    def expect(self, total_bytes: int) -> None:
        """Announce the bytes of all records together; raises StoreError at once if the disk has less to give."""
        self._check_open()
        self._total = total_bytes
        with self._or_abort():
            require_space(self._building, total_bytes - self._end)

    def add_layer(
        self,
        name: str,
        layout: RecordLayout,
        components: Sequence[NDArray[uint8]],
        tensors: Sequence[LayerTensor] = (),
    ) -> None:
        """Append one layer: per component of `layout` a uint8 array `[experts, nbytes]`, free again on return.

        `tensors` are what the layer has for all experts together. Waits for the layer before it. Raises StoreError,
        also for a failure to write that earlier layer.
        """
        self._check_open()
        with self._or_abort():
            _check_components(name, layout, components)
            if any(layer.name == name for layer in self._layers):
                raise StoreError(f"layer {name} was added to the store before")
            self._wait()
            records = self._buffer.put(layout, components)
            experts, first = len(components[0]), sum(layer.experts for layer in self._layers)
            entry = LayerEntry(name, experts, layout, first, self._end, [], list(tensors))
            self._layers.append(entry)
            self._end = entry.end
            self._in_flight = self._thread.submit(self._write, entry, records)

    def finish(self) -> Store:
        """Make the store durable, move it into place, release the lock and open it. Raises StoreError."""
        self._check_open()
        with self._or_abort():
            self._wait()
            if not self._layers:
                raise StoreError(f"the store for {self.identity.model or 'this model'} has no layers")
            os.fsync(self._fd)
            text = manifest.encode(self.identity.model, dict(self.identity.facts), self._layers)
            write_synced(self._building / manifest.MANIFEST_NAME, text)
            sync_folder(self._building)
            self._building.rename(self._final)
            sync_folder(self._final.parent)
        self._close()
        return Store.open(self._final, self.identity)

    def abort(self) -> None:
        """Remove what was written and release the lock. Harmless after `finish` or a second time."""
        if not self._open:
            return
        self._thread.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._building, ignore_errors=True)
        self._close()

    def _check_open(self) -> None:
        if not self._open:
            raise StoreError(f"the store at {self._final} was already finished or aborted")

    @contextmanager
    def _or_abort(self) -> Iterator[None]:
        try:
            with explained("build the store", self._building):
                yield
        except BaseException:
            self.abort()
            raise

    def _wait(self) -> None:
        written, self._in_flight = self._in_flight, None
        if written is not None:
            written.result()

    def _write(self, entry: LayerEntry, records: memoryview) -> None:
        entry.checksums.extend(_digests(entry.layout, records))
        for start in range(0, len(records), CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, len(records))
            with explained("build the store", self._building, need=max(self._total, self._end) - entry.offset - start):
                self._write_all(records[start:stop], entry.offset + start)
            self._buffer.give_back(start, stop)
            self.progress(entry.offset + stop)
        if not self.direct:
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, entry.offset, len(records), os.POSIX_FADV_DONTNEED)

    def _write_all(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def _close(self) -> None:
        self._open = False
        self._thread.shutdown(wait=True)
        if self._fd >= 0:
            os.close(self._fd)
        self._lock.release()


def _check_components(name: str, layout: RecordLayout, components: Sequence[NDArray[uint8]]) -> None:
    """Raises StoreError unless there is one `[experts, nbytes]` uint8 array per component of `layout`."""
    if len(components) != len(layout.components):
        raise StoreError(f"layer {name}: {len(components)} arrays for {len(layout.components)} components")
    experts = len(components[0])
    for component, data in zip(layout.components, components, strict=True):
        if data.dtype != uint8 or data.shape != (experts, component.nbytes) or experts == 0:
            raise StoreError(
                f"layer {name}, component {component.name}: got {data.dtype} {data.shape}, "
                f"expected uint8 ({experts or '1 or more experts'}, {component.nbytes})"
            )


def _digests(layout: RecordLayout, records: memoryview) -> list[int]:
    """`record_digest` of each record in `records`."""
    size = layout.record_bytes
    return [record_digest(layout.parts(records[at : at + size])) for at in range(0, len(records), size)]
