"""Reads records from the store straight into slots, several at a time, on threads that sleep when there is nothing.

It must never decide what to load, and never return a record whose checksum it has not seen match once.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import LoadError
from ..store.direct import aligned_buffer
from ..store.layout import ALIGNMENT, align
from ..store.reader import Store
from ..threads import ReportedThread, bind_to
from .memory import SlotMemory

ATTEMPTS = 2
CHUNK_BYTES = 2 << 20
"""What can wait is read in pieces of so many bytes; a demand that comes meanwhile goes before the next piece."""
SPECULATIVE_READERS = 1
"""So many threads read speculative loads at a time: a demand meets one piece at most, and threads that are free."""
_NO_BYTES = np.empty(0, dtype=np.uint8)


class DamagedRecordError(LoadError):
    """A record is not what was written to the store: cut off or changed. The store must be built again."""


class Load:
    """One record on its way into one slot. After ``join``, ``error`` is None or says why the slot holds nothing."""

    __slots__ = ("awaited", "done", "ended", "error", "expert", "layer", "memory", "slot", "speculative")

    def __init__(self, layer: int, expert: int, memory: SlotMemory, slot: int):
        self.layer = layer
        self.expert = expert
        self.memory = memory
        self.slot = slot
        self.error: LoadError | None = None
        self.speculative = False
        self.awaited = False
        """Somebody is waiting for it."""
        self.ended = 0.0
        """When the read ended, by ``time.perf_counter``."""
        self.done = threading.Lock()
        self.done.acquire()

    @property
    def finished(self) -> bool:
        return not self.done.locked()

    def finish(self) -> None:
        """The read has ended, well or not: said once, by the thread that read. Waiting ``join``s return after it."""
        self.ended = time.perf_counter()
        self.done.release()


class RecordLoader:
    """Loads records of one store into slots.

    ``demand`` is for what the forward pass waits for: the calling thread reads along with the workers, so that a
    single miss costs no hand-over. ``start`` is for what can wait: workers read it in pieces, and only while nobody
    waits for anything else.

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
        self._lock = threading.Lock()
        """Taken itself, never through ``_wake``: a signal may end ``Condition.__exit__`` before it lets go."""
        self._wake = threading.Condition(self._lock)
        self._waiting = 0
        """Calls of ``demand`` and ``join`` that have not returned."""
        self._speculating = 0
        """Workers that are carrying out a speculative load."""
        self._paused = 0
        """Workers that have made way between two pieces."""
        self._closing = False
        self._verified = [np.zeros(layer.experts, dtype=bool) for layer in store.layers]
        self._bounce = threading.local()
        self._threads = [
            ReportedThread(target=self._work, name=f"moe-offload-io-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def demand(self, loads: Sequence[Load]) -> None:
        """Read ``loads`` ahead of everything else and return when all are finished."""
        if not loads:
            return
        with self._lock:
            self._waiting += 1
            for load in loads:
                load.awaited = True
            if len(loads) > 1:
                self._demanded.extend(loads[1:])
                self._wake.notify(len(loads) - 1)
        try:
            self._read(loads[0])
        finally:
            self._see_through(loads[1:])

    def start(self, loads: Sequence[Load], speculative: bool = False, joined: bool = False) -> None:
        """Queue ``loads`` behind every demand and return at once.

        Args:
            speculative: nobody knows whether they will be needed; few are read at a time.
            joined: the calling thread will ``join`` them next and read along, so no worker is woken for them before.
        """
        with self._lock:
            for load in loads:
                load.speculative = speculative
            self._started.extend(loads)
            if not joined:
                self._wake.notify(len(loads))

    def withdraw(self, loads: Sequence[Load]) -> list[Load]:
        """Take back those of ``loads`` that are still queued, and return them: they will never finish."""
        return [load for load in loads if self._take(load)]

    def join(self, loads: Sequence[Load]) -> None:
        """Return when ``loads`` are finished, reading in the calling thread those that no worker has taken up yet."""
        pending = [load for load in loads if not load.finished]
        if not pending:
            return
        with self._lock:
            self._waiting += 1
            for load in pending:
                load.awaited = True
            queued = [load for load in self._started if load.awaited]
            if queued:
                self._started = deque(load for load in self._started if not load.awaited)
                self._demanded.extend(queued)
            if len(queued) < len(pending):  # a worker may have made way with one of them
                self._wake.notify_all()
            else:
                self._wake.notify(len(queued) - 1)
        self._see_through(pending)

    def _see_through(self, loads: Sequence[Load]) -> None:
        """Return when ``loads`` are finished; whoever made way may then go on."""
        for load in loads:
            if self._take(load):
                self._read(load)
        for load in loads:
            with load.done:
                pass
        with self._lock:
            self._waiting -= 1
            if not self._waiting and (self._started or self._paused):
                self._wake.notify_all()

    def close(self) -> None:
        """Finish the reads under way, leave the queued ones undone, end the threads."""
        with self._lock:
            self._closing = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self, load: Load) -> bool:
        """Claim a load that is still queued."""
        with self._lock:
            for queue in (self._demanded, self._started):
                try:
                    queue.remove(load)
                except ValueError:
                    continue
                return True
        return False

    def _work(self) -> None:
        bind_to(self._cpus)
        while (load := self._next()) is not None:
            try:
                self._read(load)
            finally:
                if load.speculative:
                    with self._lock:
                        self._speculating -= 1

    def _next(self) -> Load | None:
        """What to read now, once there is something; None at the end."""
        with self._lock:
            while not self._closing:
                if self._demanded:
                    load = self._demanded.popleft()
                    load.speculative = False
                    return load
                if self._started and not self._waiting:
                    load = self._started[0]
                    if not load.speculative or self._speculating < SPECULATIVE_READERS:
                        self._speculating += load.speculative
                        return self._started.popleft()
                self._wake.wait()
        return None

    def _make_way(self, load: Load) -> None:
        """Between two pieces of ``load``: if others are waited for, help with those before going on."""
        while True:
            with self._lock:
                self._paused += 1
                while self._waiting and not (self._demanded or load.awaited or self._closing):
                    self._wake.wait()
                self._paused -= 1
                if load.awaited or not self._demanded:
                    return
                other = self._demanded.popleft()
                other.speculative = False
            self._read(other)

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
        waited_for = load.awaited
        parts = load.memory.targets(load.slot)
        buffers: list[NDArray[np.uint8]] = []
        unaligned: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
        aside = sum(align(part.nbytes) for part in layout.components if part.nbytes % ALIGNMENT)
        bounce = self._bounce_buffer(aside, waited_for)
        for part in parts:
            if part.nbytes % ALIGNMENT:
                window, bounce = bounce[: align(part.nbytes)], bounce[align(part.nbytes) :]
                unaligned.append((part, window))
                buffers.append(window)
            else:
                buffers.append(part)
        position, count = self._store.offset(load.layer, load.expert), 0
        for piece in _pieces(buffers, layout.record_bytes if waited_for else CHUNK_BYTES):
            if count:
                self._make_way(load)
            wanted = sum(buffer.nbytes for buffer in piece)
            got = os.preadv(self._store.fd, piece, position + count)  # type: ignore[arg-type]  # ndarrays are buffers
            count += got
            if got != wanted:
                self._raise_short_read(position, layout.record_bytes, count)
        if not self._store.direct:
            os.posix_fadvise(self._store.fd, position, count, os.POSIX_FADV_DONTNEED)
        for part, window in unaligned:
            part[:] = window[: part.nbytes]
        self._verify(load, parts)
        load.memory.commit(load.slot)

    def _raise_short_read(self, position: int, wanted: int, got: int) -> NoReturn:
        """Raise what a read that brought too little means: only a file that ends there is damaged."""
        read = f"{got} of {wanted} bytes at offset {position}"
        if os.fstat(self._store.fd).st_size < position + wanted:
            raise DamagedRecordError(f"{read}: the file is too short")
        raise LoadError(f"{read}: the read was cut short")

    def _verify(self, load: Load, parts: Sequence[NDArray[np.uint8]]) -> None:
        verified = self._verified[load.layer]
        if verified[load.expert]:
            return
        if self._store.record_digest(parts) != self._store.checksum(load.layer, load.expert):
            raise DamagedRecordError("its checksum does not match: the store is damaged")
        verified[load.expert] = True

    def _bounce_buffer(self, size: int, waited_for: bool) -> NDArray[np.uint8]:
        """``size`` bytes or more. A demand may be read between two pieces of something else, by the same thread."""
        name = "demanded" if waited_for else "started"
        buffer: NDArray[np.uint8] = getattr(self._bounce, name, _NO_BYTES)
        if buffer.nbytes < size:
            buffer = np.frombuffer(aligned_buffer(size), dtype=np.uint8)
            setattr(self._bounce, name, buffer)
        return buffer


def _pieces(buffers: Sequence[NDArray[np.uint8]], most: int) -> Iterator[list[NDArray[np.uint8]]]:
    """Consecutive parts of ``buffers``, of ``most`` bytes each and the last of what is left."""
    piece: list[NDArray[np.uint8]] = []
    room = most
    for buffer in buffers:
        flat = buffer.reshape(-1)
        while flat.nbytes:
            piece.append(flat[:room])
            flat = flat[room:]
            room -= piece[-1].nbytes
            if not room:
                yield piece
                piece, room = [], most
    if piece:
        yield piece
