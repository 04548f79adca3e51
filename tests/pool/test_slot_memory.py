"""What a pool may rely on in the memory of its slots, for every kind of memory there is."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.record_stores import LAYOUTS, MIXED, build_store
from vllm_moe_offload.errors import LoadError
from vllm_moe_offload.ipc.arena import Arena
from vllm_moe_offload.pool.loader import Load, RecordLoader
from vllm_moe_offload.pool.memory import HostMemory, SlotMemory
from vllm_moe_offload.store.layout import ALIGNMENT, RecordLayout

pytest.importorskip("torch")

SLOTS = 6


def of_the_daemon(layout: RecordLayout) -> SlotMemory:
    return Arena.create("test", layout, SLOTS)


def of_a_daemon_that_is_gone(layout: RecordLayout) -> SlotMemory:
    """As an engine that outlives its daemon writes it."""
    theirs = Arena.create("test", layout, SLOTS)
    ours = Arena.attach(theirs.mapping.reader_descriptor(), layout, SLOTS)
    ours.mapping.become_private()
    return ours


KINDS: dict[str, Callable[[RecordLayout], SlotMemory]] = {
    "host": lambda layout: HostMemory(layout, SLOTS),
    "daemon": of_the_daemon,
    "survivor": of_a_daemon_that_is_gone,
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> Callable[[RecordLayout], SlotMemory]:
    return request.param


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request: pytest.FixtureRequest) -> RecordLayout:
    return request.param


@pytest.fixture
def memory(kind: Callable[[RecordLayout], SlotMemory], layout: RecordLayout) -> SlotMemory:
    return kind(layout)


def write(memory: SlotMemory, slot: int, value: int) -> None:
    for part in memory.targets(slot):
        part[:] = value
    memory.commit(slot)


def read(memory: SlotMemory, slot: int) -> list[np.ndarray]:
    """As a kernel would."""
    return [tensor[slot].cpu().numpy() for tensor in memory.tensors()]


def test_tensors_are_dense_bytes_of_every_slot(memory: SlotMemory) -> None:
    tensors = memory.tensors()
    assert [tuple(tensor.shape) for tensor in tensors] == [(SLOTS, part.nbytes) for part in memory.layout.components]
    assert all(tensor.is_contiguous() and str(tensor.dtype) == "torch.uint8" for tensor in tensors)


def test_targets_fit_the_layout_and_blocks_are_read_to_directly(memory: SlotMemory) -> None:
    for slot in range(SLOTS):
        parts = memory.targets(slot)
        assert [part.shape for part in parts] == [(component.nbytes,) for component in memory.layout.components]
        for part in parts:
            assert part.dtype == np.uint8 and part.flags.writeable and part.flags.c_contiguous
            assert part.nbytes % ALIGNMENT or part.ctypes.data % ALIGNMENT == 0


def test_what_is_committed_is_read_in_its_slot_and_nowhere_else(memory: SlotMemory) -> None:
    for slot in (3, 0, 5):
        write(memory, slot, slot + 1)
    for slot in (3, 0, 5):
        assert all((part == slot + 1).all() for part in read(memory, slot))
    for slot in (1, 2, 4):
        assert not any(part.any() for part in read(memory, slot))


def test_a_slot_is_written_again_and_its_tensors_stay_where_they_are(memory: SlotMemory) -> None:
    addresses = [tensor.data_ptr() for tensor in memory.tensors()]
    for value in (1, 2, 3):
        write(memory, 2, value)
        assert all((part == value).all() for part in read(memory, 2))
    assert [tensor.data_ptr() for tensor in memory.tensors()] == addresses


def test_an_attempt_that_failed_leaves_nothing_to_the_next(memory: SlotMemory) -> None:
    for part in memory.targets(1):
        part[:] = 7
    write(memory, 1, 9)
    assert all((part == 9).all() for part in read(memory, 1))


def test_slots_are_written_at_the_same_time(memory: SlotMemory) -> None:
    with ThreadPoolExecutor(SLOTS) as threads:
        for turn in range(10):
            list(threads.map(lambda slot, turn=turn: write(memory, slot, 10 * turn + slot), range(SLOTS)))
            assert all((part == 10 * turn + slot).all() for slot in range(SLOTS) for part in read(memory, slot))


def test_another_slot_is_begun_before_one_is_complete(memory: SlotMemory) -> None:
    first = memory.targets(0)
    write(memory, 1, 5)
    for part in first:
        part[:] = 4
    memory.commit(0)
    assert all((part == 4).all() for part in read(memory, 0))
    assert all((part == 5).all() for part in read(memory, 1))


@pytest.mark.parametrize("threads", [0, 3])
def test_the_loader_brings_records_to_where_kernels_read_them(
    tmp_path: Path, kind: Callable[[RecordLayout], SlotMemory], layout: RecordLayout, threads: int
) -> None:
    made, memory = build_store(tmp_path, [(layout, SLOTS)]), kind(layout)
    loader = RecordLoader(made.store, threads)
    loads = [Load(0, expert, memory, SLOTS - 1 - expert) for expert in range(SLOTS)]
    loader.demand(loads)
    loader.close()
    assert [load.error for load in loads] == [None] * SLOTS
    for expert in range(SLOTS):
        found, right = read(memory, SLOTS - 1 - expert), made.records[0][expert]
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(found, right, strict=True))
    made.store.close()


class FailingMemory(HostMemory):
    """Host memory one of whose steps fails a number of times."""

    def __init__(self, layout: RecordLayout, step: str, times: int):
        super().__init__(layout, SLOTS)
        self.step, self.times = step, times
        self.committed: list[int] = []

    def targets(self, slot: int) -> list[np.ndarray]:
        self._fail("targets")
        return super().targets(slot)

    def commit(self, slot: int) -> None:
        self._fail("commit")
        self.committed.append(slot)

    def _fail(self, step: str) -> None:
        if step == self.step and self.times:
            self.times -= 1
            raise LoadError(f"{step} failed")


@pytest.mark.parametrize("step", ["targets", "commit"])
def test_a_load_whose_memory_fails_is_tried_again_and_then_an_error(tmp_path: Path, step: str) -> None:
    made = build_store(tmp_path, [(MIXED, SLOTS)])
    loader = RecordLoader(made.store, 0)
    once, always = FailingMemory(MIXED, step, 1), FailingMemory(MIXED, step, 99)
    loads = [Load(0, 1, once, 1), Load(0, 2, always, 2)]
    loader.demand(loads)
    assert loads[0].error is None and made.holds(once, 1, 0, 1) and once.committed == [1]
    assert f"expert 2 of layer 0 could not be read from {made.store.path} (attempt 2 of 2): {step} failed" in str(
        loads[1].error
    )
    assert not always.committed
    loader.close()
    made.store.close()
