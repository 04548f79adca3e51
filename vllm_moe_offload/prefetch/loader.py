"""Reads records from the store straight into slots, several at a time, on threads that sleep when there is nothing.

It must never decide what to load, and never return a record whose checksum it has not seen match once.
"""

import mmap
import os
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import LoadError
from ..store.layout import ALIGNMENT
from ..store.reader import Store

ATTEMPTS = 2


class DamagedRecordError(LoadError):
    """A record is not what was written to the store: cut off or changed. The store must be built again."""


class Load:
    """One record on its way into one slot. After ``join``, ``error`` is None or says why the slot holds nothing."""

    __slots__ = ("done", "error", "expert", "layer", "parts")

    def __init__(self, layer: int, expert: int, parts: Sequence[NDArray[np.uint8]]):
        self.layer = layer
        self.expert = expert
        self.parts = parts
        self.error: LoadError | None = None
        self.done = threading.Lock()
        self.done.acquire()

    @property
    def finished(self) -> bool:
        return not self.done.locked()

    def finish(self) -> None:
        """The read has ended, well or not: said once, by the thread that read. Waiting ``join``s return after it."""
        self.done.release()


class RecordLoader:
    """Loads records of one store into slots.

    ``demand`` is for what the forward pass waits for: the calling thread reads along with the workers, so that a
    single miss costs no hand-over. ``start`` is for what can wait: workers take it up only when no demand is queued.

    Args:
        store: where records come from; must outlive the loader.
        threads: reads in flight besides the caller's own.
        cpus: where the threads may run; None leaves them where the process runs.
    """

    def __init__(self, store: Store, threads: int = 4, cpus: set[int] | None = None):
        if not store.direct:
            # reading ahead would fill the page cache with records nobody asked for
            os.posix_fadvise(store.fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._store = store
        self._cpus = cpus
        self._demanded: deque[Load] = deque()
        self._started: deque[Load] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._verified = [np.zeros(layer.experts, dtype=bool) for layer in store.layers]
        self._bounce = threading.local()
        self._threads = [
            threading.Thread(target=self._work, name=f"moe-offload-io-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def demand(self, loads: Sequence[Load]) -> None:
        """Read ``loads`` ahead of everything else and return when all are finished."""
        if len(loads) > 1:
            with self._wake:
                self._demanded.extend(loads[1:])
                self._wake.notify(len(loads) - 1)
        if loads:
            self._read(loads[0])
        self.join(loads[1:])

    def start(self, loads: Sequence[Load]) -> None:
        """Queue ``loads`` behind every demand and return at once."""
        with self._wake:
            self._started.extend(loads)
            self._wake.notify(len(loads))

    def withdraw(self, loads: Sequence[Load]) -> list[Load]:
        """Take back those of ``loads`` that are still queued, and return them: they will never finish."""
        return [load for load in loads if self._take(load)]

    def join(self, loads: Sequence[Load]) -> None:
        """Return when ``loads`` are finished, reading in the calling thread those that no worker has taken up yet."""
        for load in loads:
            if self._take(load):
                self._read(load)
        for load in loads:
            with load.done:
                pass

    def close(self) -> None:
        """Finish the reads under way, leave the queued ones undone, end the threads."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self, load: Load) -> bool:
        """Claim a load that is still queued."""
        with self._wake:
            for queue in (self._demanded, self._started):
                try:
                    queue.remove(load)
                except ValueError:
                    continue
                return True
        return False

    def _work(self) -> None:
        if self._cpus:
            os.sched_setaffinity(threading.get_native_id(), self._cpus)
        while True:
            with self._wake:
                while not (self._demanded or self._started or self._closing):
                    self._wake.wait()
                if self._closing:
                    return
                load = (self._demanded or self._started).popleft()
            self._read(load)

    def _read(self, load: Load) -> None:
        where = f"expert {load.expert} of {self._store.layers[load.layer].name}"
        # until it is known to be right: whatever ends this thread, a slot of unknown bytes must not pass for loaded
        load.error = LoadError(f"{where} was not read to the end")
        try:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    self._transfer(load)
                except (OSError, LoadError) as error:
                    kind = type(error) if isinstance(error, LoadError) else LoadError
                    load.error = kind(
                        f"{where} could not be read from {self._store.path} (attempt {attempt} of {ATTEMPTS}): {error}"
                    )
                else:
                    load.error = None
                    return
        finally:
            load.finish()

    def _transfer(self, load: Load) -> None:
        layout = self._store.layers[load.layer].layout
        buffers: list[NDArray[np.uint8]] = []
        unaligned: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
        for part, offset in zip(load.parts, layout.offsets, strict=True):
            padding = -part.nbytes % ALIGNMENT
            if padding:
                window = self._bounce_buffer(layout.record_bytes)[offset : offset + part.nbytes + padding]
                unaligned.append((part, window))
                buffers.append(window)
            else:
                buffers.append(part)
        position = self._store.offset(load.layer, load.expert)
        count = os.preadv(self._store.fd, buffers, position)  # type: ignore[arg-type]  # an ndarray is a buffer
        if count != layout.record_bytes:
            raise DamagedRecordError(
                f"{count} of {layout.record_bytes} bytes at offset {position}: the file is too short"
            )
        if not self._store.direct:
            os.posix_fadvise(self._store.fd, position, count, os.POSIX_FADV_DONTNEED)
        for part, window in unaligned:
            part[:] = window[: part.nbytes]
        self._verify(load)

    def _verify(self, load: Load) -> None:
        verified = self._verified[load.layer]
        if verified[load.expert]:
            return
        if self._store.record_digest(load.parts) != self._store.checksum(load.layer, load.expert):
            raise DamagedRecordError("its checksum does not match: the store is damaged")
        verified[load.expert] = True

    def _bounce_buffer(self, size: int) -> NDArray[np.uint8]:
        buffer: NDArray[np.uint8] | None = getattr(self._bounce, "buffer", None)
        if buffer is None or buffer.nbytes < size:
            buffer = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
            self._bounce.buffer = buffer
        return buffer
