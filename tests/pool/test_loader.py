"""Loading records for real: what arrives is right or an error, whatever happens to the file, and idle threads sleep."""

import ctypes
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runtime.record_stores import ALIGNED, LAYOUTS, MIXED, ODD, RecordStore, build_store, layout
from vllm_moe_offload.errors import LoadError
from vllm_moe_offload.pool import HostMemory
from vllm_moe_offload.pool.loader import CHUNK_BYTES, SPECULATIVE_READERS, DamagedRecordError, Load, RecordLoader
from vllm_moe_offload.pool.memory import SlotMemory
from vllm_moe_offload.store import Store

EXPERTS = 6
Opener = Callable[..., RecordLoader]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Make loaders that are closed at the end of the test."""
    loaders = []

    def make(*arguments: Any, **options: Any) -> RecordLoader:
        loaders.append(RecordLoader(*arguments, **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


class WatchedMemory(SlotMemory):
    """Tells when the loader turns to a slot, before it gives it away, and when a record is complete."""

    def __init__(self, memory: HostMemory, on_touch: Callable[[], object] = lambda: None):
        self.layout, self.slots = memory.layout, memory.slots
        self.committed: list[int] = []
        self._memory = memory
        self._on_touch = on_touch

    def targets(self, slot: int) -> list[np.ndarray]:
        self._on_touch()
        return self._memory.targets(slot)

    def commit(self, slot: int) -> None:
        self.committed.append(slot)
        self._memory.commit(slot)

    def tensors(self) -> tuple:
        return self._memory.tensors()


def wait_for(loads: list[Load]) -> None:
    """Without joining, which would read along and count as waiting."""
    for load in loads:
        assert load.done.acquire(timeout=30)
        load.done.release()


def loads_of_layer(pool: HostMemory, layer: int, first_slot: int = 0) -> list[Load]:
    return [Load(layer, expert, pool, first_slot + expert) for expert in range(EXPERTS)]


@pytest.mark.parametrize("threads", [0, 1, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_records_arrive_in_their_slots_and_nowhere_else(
    tmp_path: Path, opened: Opener, name: str, threads: int
) -> None:
    made = build_store(tmp_path, [(LAYOUTS[name], EXPERTS)] * 2)
    pool = HostMemory(LAYOUTS[name], EXPERTS + 2)
    loader = opened(made.store, threads)
    loads = loads_of_layer(pool, layer=1, first_slot=1)
    loader.demand(loads)
    assert all(load.finished and load.error is None for load in loads)
    assert all(made.holds(pool, 1 + expert, 1, expert) for expert in range(EXPERTS))
    for untouched in (0, EXPERTS + 1):
        assert not any(part.any() for part in pool.targets(untouched))
    loader.demand([])


def test_started_and_demanded_loads_of_several_layouts_at_once(tmp_path: Path, opened: Opener) -> None:
    made = build_store(tmp_path, [(ALIGNED, EXPERTS), (ODD, EXPERTS), (MIXED, EXPERTS)] * 4)
    loader = opened(made.store, 8)
    pools = {layout: HostMemory(layout, 4 * EXPERTS) for layout in (ALIGNED, ODD, MIXED)}
    shuffle = random.Random(0).shuffle
    for _ in range(20):
        for pool in pools.values():
            for component in pool.components:
                component[:] = 0
        loads = [
            Load(layer, expert, pools[entry.layout], layer // 3 * EXPERTS + expert)
            for layer, entry in enumerate(made.store.layers)
            for expert in range(EXPERTS)
        ]
        shuffle(loads)
        started, demanded = loads[:40], loads[40:]
        loader.start(started)
        loader.demand(demanded)
        loader.join(started)
        for load in loads:
            assert load.finished and load.error is None
            slot = load.layer // 3 * EXPERTS + load.expert
            assert made.holds(pools[made.store.layers[load.layer].layout], slot, load.layer, load.expert)


def test_a_worker_takes_up_demands_before_what_was_started_earlier(tmp_path: Path, opened: Opener) -> None:
    made = build_store(tmp_path, [(ODD, EXPERTS)])
    loader, pool = opened(made.store, 1), HostMemory(ODD, EXPERTS)
    order: list[str] = []
    worker_busy, worker_may_go, caller_busy, caller_may_go = (threading.Event() for _ in range(4))

    def watched(expert: int, name: str, busy: threading.Event | None = None, may_go: threading.Event | None = None):
        def touched() -> None:
            if name not in order:
                order.append(name)
            if busy and may_go:
                busy.set()
                assert may_go.wait(30)

        return Load(0, expert, WatchedMemory(pool, touched), expert)

    started = [watched(0, "busy worker", worker_busy, worker_may_go), watched(1, "started 1"), watched(2, "started 2")]
    demanded = [watched(3, "busy caller", caller_busy, caller_may_go), watched(4, "demand 1"), watched(5, "demand 2")]
    loader.start(started)
    assert worker_busy.wait(30)
    with ThreadPoolExecutor(1) as caller:
        returned = caller.submit(loader.demand, demanded)
        assert caller_busy.wait(30)
        worker_may_go.set()
        wait_for(demanded[1:])
        caller_may_go.set()
        returned.result(30)
        wait_for(started)
    assert order == ["busy worker", "busy caller", "demand 1", "demand 2", "started 1", "started 2"]
    assert all(made.holds(pool, expert, 0, expert) for expert in range(EXPERTS))


class Reads:
    """Tells which expert each real read of a store is for, and holds those of some experts until told otherwise."""

    def __init__(self, made: RecordStore, monkeypatch: pytest.MonkeyPatch):
        self.order: list[int] = []
        self.sizes: list[int] = []
        self.began: dict[int, threading.Event] = {}
        self.may_go: dict[int, threading.Event] = {}
        record_bytes, read = made.store.layers[0].layout.record_bytes, os.preadv

        def watched(fd: int, buffers: list, position: int) -> int:
            expert = position // record_bytes
            self.order.append(expert)
            self.sizes.append(sum(memoryview(buffer).nbytes for buffer in buffers))
            if expert in self.began:
                self.began[expert].set()
                assert self.may_go[expert].wait(30)
            return read(fd, buffers, position)

        monkeypatch.setattr(os, "preadv", watched)

    def hold(self, *experts: int) -> None:
        for expert in experts:
            self.began[expert], self.may_go[expert] = threading.Event(), threading.Event()


BIG = layout(2 * CHUNK_BYTES + 8192, 100, CHUNK_BYTES // 2)


def test_a_demand_goes_before_the_next_piece_of_a_guess(
    tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_store(tmp_path, [(BIG, EXPERTS)])
    reads, loader, pool = Reads(made, monkeypatch), opened(made.store, 1), HostMemory(BIG, EXPERTS)
    reads.hold(0, 1)
    loads = loads_of_layer(pool, 0)
    loader.start(loads[:1], speculative=True)
    assert reads.began[0].wait(30)
    with ThreadPoolExecutor(1) as caller:
        demanded = caller.submit(loader.demand, loads[1:5])
        assert reads.began[1].wait(30)
        reads.may_go[0].set()
        wait_for(loads[2:5])  # by the only worker, which therefore has left the guess alone
        assert reads.order == [0, 1, 2, 3, 4]
        reads.may_go[1].set()
        demanded.result(30)
    wait_for(loads[:1])
    assert reads.order == [0, 1, 2, 3, 4, 0, 0] and max(reads.sizes[:1] + reads.sizes[5:]) == CHUNK_BYTES
    assert all(load.error is None for load in loads[:5])
    assert all(made.holds(pool, expert, 0, expert) for expert in range(5))


def test_a_guess_that_is_waited_for_makes_no_way(
    tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_store(tmp_path, [(BIG, EXPERTS)])
    reads, loader, pool = Reads(made, monkeypatch), opened(made.store, 2), HostMemory(BIG, EXPERTS)
    reads.hold(0, 1)
    loads = loads_of_layer(pool, 0)
    loader.start(loads[:1], speculative=True)
    assert reads.began[0].wait(30)
    with ThreadPoolExecutor(2) as callers:
        demanding = callers.submit(loader.demand, loads[1:2])
        assert reads.began[1].wait(30)
        joining = callers.submit(loader.join, loads[:1])
        reads.may_go[0].set()
        joining.result(30)
        assert not demanding.done(), "it came to its end while another demand was being read"
        reads.may_go[1].set()
        demanding.result(30)
    assert all(made.holds(pool, expert, 0, expert) for expert in range(2))


def test_speculative_loads_leave_threads_free_for_demands(
    tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_store(tmp_path, [(BIG, 12)])
    reads, loader, pool = Reads(made, monkeypatch), opened(made.store, SPECULATIVE_READERS + 1), HostMemory(BIG, 12)
    guessed = range(SPECULATIVE_READERS + 2)
    reads.hold(*guessed, 9)
    loads = [Load(0, expert, pool, expert) for expert in range(12)]
    loader.start([loads[expert] for expert in guessed], speculative=True)
    for expert in range(SPECULATIVE_READERS):
        assert reads.began[expert].wait(30)
    with ThreadPoolExecutor(1) as caller:
        demanded = caller.submit(loader.demand, loads[9:])
        assert reads.began[9].wait(30)
        wait_for(loads[10:])  # by the worker that reads no guess
        reads.may_go[9].set()
        demanded.result(30)
    assert (
        sorted(reads.order[:SPECULATIVE_READERS]) == list(range(SPECULATIVE_READERS))
        and reads.order[SPECULATIVE_READERS] >= 9
    )
    for expert in guessed:
        reads.may_go[expert].set()
    wait_for(loads[: len(guessed)])
    assert all(load.error is None for load in loads[: len(guessed)])


def test_joining_reads_what_no_worker_has_taken_up(tmp_path: Path, opened: Opener) -> None:
    made = build_store(tmp_path, [(ODD, EXPERTS)])
    loader, pool = opened(made.store, 0), HostMemory(ODD, EXPERTS)
    loads = loads_of_layer(pool, 0)
    loader.start(loads)
    assert not any(load.finished for load in loads)
    loader.join(loads[3:])
    assert [load.finished for load in loads] == [False] * 3 + [True] * 3
    loader.join(loads)
    assert all(made.holds(pool, expert, 0, expert) for expert in range(EXPERTS))


@pytest.mark.parametrize("threads", [0, 4])
def test_a_changed_record_is_an_error_after_one_retry_and_right_again_once_restored(
    tmp_path: Path, opened: Opener, threads: int
) -> None:
    made = build_store(tmp_path, [(MIXED, EXPERTS)])
    loader, pool = opened(made.store, threads), HostMemory(MIXED, EXPERTS)
    made.flip(0, 2, byte=4096 + 99)
    attempts: list[int] = []
    loads = loads_of_layer(pool, 0)
    loads[2].memory = watched = WatchedMemory(pool, lambda: attempts.append(threading.get_ident()))
    loader.demand(loads)
    assert [load.expert for load in loads if load.error is not None] == [2]
    assert isinstance(loads[2].error, DamagedRecordError)
    assert str(loads[2].error) == (
        f"expert 2 of layer 0 could not be read from {made.store.path} (attempt 2 of 2): "
        "its checksum does not match: the store is damaged"
    )
    assert len(attempts) == 2 and not watched.committed
    made.flip(0, 2, byte=4096 + 99)
    again = Load(0, 2, pool, 2)
    loader.demand([again])
    assert again.error is None and made.holds(pool, 2, 0, 2)


def test_the_retry_saves_a_record_whose_first_read_went_wrong(tmp_path: Path, opened: Opener) -> None:
    made = build_store(tmp_path, [(ALIGNED, EXPERTS)])
    loader, pool = opened(made.store, 0), HostMemory(ALIGNED, 1)
    made.flip(0, 4)
    touches: list[None] = []

    def restore_before_the_second_attempt() -> None:
        touches.append(None)
        if len(touches) == 2:
            made.flip(0, 4)

    watched = WatchedMemory(pool, restore_before_the_second_attempt)
    load = Load(0, 4, watched, 0)
    loader.demand([load])
    assert load.error is None and watched.committed == [0] and made.holds(pool, 0, 0, 4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_damaged_a_load_is_right_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    made = build_store(tmp_path_factory.mktemp("damage"), [(shape, EXPERTS)])
    size = made.file.stat().st_size
    for byte in data.draw(st.lists(st.integers(0, size - 1), max_size=6)):
        made.flip(0, 0, byte)
    if data.draw(st.booleans()):
        os.truncate(made.file, data.draw(st.integers(0, size)))
    loader, pool = RecordLoader(made.store, data.draw(st.integers(0, 3))), HostMemory(shape, EXPERTS)
    for _ in range(2):
        loads = loads_of_layer(pool, 0)
        loader.demand(loads)
        for load in loads:
            assert load.error is not None or made.holds(pool, load.expert, 0, load.expert)
        damaged = {expert for _, expert in made.store.verify()}
        assert {load.expert for load in loads if load.error is not None} >= damaged
    loader.close()


def test_a_file_cut_while_open_fails_what_is_gone_and_serves_the_rest(tmp_path: Path, opened: Opener) -> None:
    made = build_store(tmp_path, [(ODD, EXPERTS)] * 2)
    loader, pool = opened(made.store, 2), HostMemory(ODD, EXPERTS)
    loader.demand(loads_of_layer(pool, 1))
    os.truncate(made.file, made.store.offset(1, 3) + 4096)
    loads = loads_of_layer(pool, 1)
    loader.demand(loads)
    assert [load.expert for load in loads if isinstance(load.error, DamagedRecordError)] == [3, 4, 5]
    assert "attempt 2 of 2): 4096 of 12288 bytes" in str(loads[3].error)
    assert "the file is too short" in str(loads[3].error)
    assert [load.expert for load in loads if load.error is None] == [0, 1, 2]


@pytest.mark.parametrize(
    ("path", "flags", "what"),
    [
        ("/proc/self/mem", os.O_RDONLY, "Input/output error"),
        ("/dev/null", os.O_WRONLY, "Bad file descriptor"),
        ("/", os.O_RDONLY, "Is a directory"),
    ],
)
def test_system_errors_fail_the_loads_and_not_the_loader(
    tmp_path: Path, opened: Opener, path: str, flags: int, what: str
) -> None:
    """Reading the first pages of one's own memory, which are never mapped, is a real EIO."""
    made = build_store(tmp_path, [(ODD, EXPERTS)])
    loader, pool = opened(made.store, 2), HostMemory(ODD, EXPERTS)
    sound, broken = os.dup(made.store.fd), os.open(path, flags)
    os.dup2(broken, made.store.fd)
    loads = loads_of_layer(pool, 0)
    loader.demand(loads)
    assert all(what in str(load.error) and "(attempt 2 of 2)" in str(load.error) for load in loads)
    assert not any(isinstance(load.error, DamagedRecordError) for load in loads)
    os.dup2(sound, made.store.fd)
    loads = loads_of_layer(pool, 0)
    loader.demand(loads)
    assert all(load.error is None and made.holds(pool, load.expert, 0, load.expert) for load in loads)
    os.close(sound)
    os.close(broken)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_in_the_loader_never_passes_for_a_loaded_record(tmp_path: Path, opened: Opener) -> None:
    """The kernel will not write into memory that Python calls read-only: TypeError, on a worker."""
    made = build_store(tmp_path, [(ALIGNED, EXPERTS)])
    loader, pool = opened(made.store, 1), HostMemory(ALIGNED, 1)
    for component in pool.components:
        component.flags.writeable = False
    taken = threading.Event()
    load = Load(0, 0, WatchedMemory(pool, taken.set), 0)
    loader.start([load])
    assert taken.wait(30)
    loader.join([load])
    assert isinstance(load.error, LoadError) and "not read to the end" in str(load.error)


def test_a_removed_store_goes_on_serving(tmp_path: Path, opened: Opener) -> None:
    made = build_store(tmp_path / "stores", [(MIXED, EXPERTS)])
    loader, pool = opened(made.store, 2), HostMemory(MIXED, EXPERTS)
    shutil.rmtree(tmp_path / "stores")
    loads = loads_of_layer(pool, 0)
    loader.demand(loads)
    assert all(load.error is None and made.holds(pool, load.expert, 0, load.expert) for load in loads)


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that refuses O_DIRECT."""
    folder = tmp_path / "ramfs"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "ramfs", "ramfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_system_without_direct_io_serves_the_same_bytes(ramfs: Path, opened: Opener, name: str) -> None:
    made = build_store(ramfs, [(LAYOUTS[name], EXPERTS)])
    assert not made.store.direct
    loader, pool = opened(made.store, 4), HostMemory(LAYOUTS[name], EXPERTS)
    made.flip(0, 5)
    loads = loads_of_layer(pool, 0)
    loader.demand(loads)
    assert [load.expert for load in loads if load.error is not None] == [5]
    assert all(made.holds(pool, expert, 0, expert) for expert in range(EXPERTS - 1))


def test_buffered_reads_leave_nothing_in_the_page_cache(tmp_path: Path, opened: Opener) -> None:
    made = build_store(tmp_path, [(ODD, 400)])
    fd = os.open(made.file, os.O_RDONLY)
    buffered = Store.open(made.store.path)
    os.dup2(fd, buffered.fd)
    buffered.direct = False
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    loader, pool = opened(buffered, 4), HostMemory(ODD, 1)
    for expert in random.Random(0).sample(range(400), 200):
        loader.demand([Load(0, expert, pool, 0)])
        assert made.holds(pool, 0, 0, expert)
    assert cached_bytes(fd) <= 8 * ODD.record_bytes
    os.close(fd)


def cached_bytes(fd: int) -> int:
    """What of a file is in the page cache, by cachestat(2)."""
    whole_file, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    if ctypes.CDLL(None, use_errno=True).syscall(451, fd, whole_file, found, 0):
        pytest.skip(f"no cachestat here: {os.strerror(ctypes.get_errno())}")
    return found[0] * os.sysconf("SC_PAGESIZE")


def test_closing_ends_idle_threads_and_leaves_queued_loads_to_whoever_joins_them(tmp_path: Path) -> None:
    made = build_store(tmp_path, [(ODD, EXPERTS)])
    before = set(threading.enumerate())
    loader, pool = RecordLoader(made.store, 1), HostMemory(ODD, EXPERTS)
    (worker,) = set(threading.enumerate()) - before
    busy, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        busy.set()
        assert may_go.wait(30)

    loads = [Load(0, 0, WatchedMemory(pool, hold), 0), Load(0, 1, pool, 1)]
    loader.start(loads)
    assert busy.wait(30)
    with ThreadPoolExecutor(1) as other:
        closed = other.submit(loader.close)
        may_go.set()
        closed.result(30)
    assert not worker.is_alive()
    assert loads[0].finished
    loader.join(loads)
    assert all(load.finished and load.error is None for load in loads)
    loader.close()


def test_idle_threads_neither_run_nor_wake(tmp_path: Path, opened: Opener) -> None:
    made = build_store(tmp_path, [(ODD, EXPERTS)])
    before = set(threading.enumerate())
    loader, pool = opened(made.store, 4), HostMemory(ODD, EXPERTS)
    workers = set(threading.enumerate()) - before
    loader.demand(loads_of_layer(pool, 0))

    def activity() -> list[tuple[float, str]]:
        return [(time.clock_gettime(time.pthread_getcpuclockid(w.ident)), switches(w.native_id)) for w in workers]

    def work() -> None:
        started = time.process_time()
        while time.process_time() - started < 0.3:
            made.store.verify()

    # a worker that only waits for the interpreter looks like one at rest
    until, settled = time.monotonic() + 10, None
    while (now := activity()) != settled or any(state(w.native_id) != "S" for w in workers):
        assert time.monotonic() < until, "the workers never come to rest"
        settled = now
        work()
    work()
    assert activity() == settled


def state(thread: int) -> str:
    return Path(f"/proc/self/task/{thread}/stat").read_text().rsplit(")", 1)[1].split()[0]


def switches(thread: int) -> str:
    return next(
        line for line in Path(f"/proc/self/task/{thread}/status").read_text().splitlines() if "voluntary_ctxt" in line
    )


def test_threads_run_where_they_are_told_to(tmp_path: Path, opened: Opener) -> None:
    made = build_store(tmp_path, [(ODD, EXPERTS)])
    cpu = max(os.sched_getaffinity(0))
    loader, pool = opened(made.store, 1, cpus={cpu}), HostMemory(ODD, 1)
    seen: list[set[int]] = []
    touched = threading.Event()

    def look() -> None:
        seen.append(os.sched_getaffinity(0))
        touched.set()

    load = Load(0, 0, WatchedMemory(pool, look), 0)
    loader.start([load])
    assert touched.wait(30)
    loader.join([load])
    assert seen[0] == {cpu} and cpu in os.sched_getaffinity(0)


def test_a_read_that_was_cut_short_is_no_damage_while_the_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A medium may return a part before it reports its error; no store is set aside for that."""
    built, memory = build_store(tmp_path, [(ALIGNED, 4)]), HostMemory(ALIGNED, 4)
    loader, whole = RecordLoader(built.store, threads=1), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, offset: whole(fd, parts[:1], offset))
    load = Load(0, 1, memory, 1)
    loader.demand([load])
    assert isinstance(load.error, LoadError) and not isinstance(load.error, DamagedRecordError)
    assert "the read was cut short" in str(load.error)
    monkeypatch.undo()
    again = Load(0, 1, memory, 1)
    loader.demand([again])
    loader.close()
    assert again.error is None
