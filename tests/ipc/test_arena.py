"""An arena serves wherever a host pool does: the loader fills its slots, tensors lie in it, readers only read."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.record_stores import LAYOUTS, MIXED, build_store, layout
from vllm_moe_offload.errors import ConfigError, LoadError
from vllm_moe_offload.ipc.arena import Arena, arena_bytes
from vllm_moe_offload.ipc.shm import PeerMemoryError
from vllm_moe_offload.pool.huge_pages import SETTINGS, shared_page_bytes
from vllm_moe_offload.pool.loader import Load, RecordLoader
from vllm_moe_offload.store import RecordLayout

PAGE = 4096
MIB = 2**20


def pages_taken(arena: Arena) -> int:
    return os.fstat(arena.mapping.fd).st_blocks * 512 // PAGE


def reader_of(arena: Arena) -> Arena:
    return Arena.attach(arena.mapping.reader_descriptor(), arena.layout, arena.slots)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3 * PAGE), min_size=1, max_size=5).filter(any), st.integers(1, 9))
def test_slots_are_dense_page_aligned_and_apart(sizes: list[int], slots: int) -> None:
    arena = Arena.create("test", layout(*sizes), slots)
    assert [component.shape for component in arena.components] == [(slots, size) for size in sizes]
    for component in arena.components:
        assert component.flags.c_contiguous and component.ctypes.data % PAGE == 0
    for slot in range(slots):
        for part in arena.slot(slot):
            part[:] = slot + 1
    seen = reader_of(arena)
    for slot in range(slots):
        assert all((part == slot + 1).all() for part in seen.slot(slot))
    arena.punch(0)
    assert not any(part.any() for part in seen.slot(0))
    for slot in range(1, slots):
        assert all((part == slot + 1).all() for part in seen.slot(slot))
    arena.mapping.close()
    seen.mapping.close()


@pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_loader_fills_slots_that_others_read(tmp_path: Path, shape: RecordLayout) -> None:
    made = build_store(tmp_path, [(shape, 6)])
    arena = Arena.create("test", shape, 6)
    seen = reader_of(arena)
    loader = RecordLoader(made.store, threads=2)
    loads = [Load(0, expert, arena, 5 - expert) for expert in range(6)]
    loader.demand(loads)
    loader.close()
    assert [load.error for load in loads] == [None] * 6
    assert all(made.holds(seen, 5 - expert, 0, expert) for expert in range(6))
    made.store.close()


def test_readers_get_read_only_slots_until_the_memory_is_their_own() -> None:
    arena = Arena.create("test", MIXED, 3)
    seen = reader_of(arena)
    assert not any(part.flags.writeable for part in seen.slot(1))
    seen.mapping.become_private()
    for part in seen.slot(1):
        part[:] = 7
    assert all((component[1] == 7).all() for component in seen.components)
    assert not any(part.any() for part in arena.slot(1))


def test_memory_is_taken_slot_by_slot_and_given_back() -> None:
    arena = Arena.create("test", layout(MIB, PAGE), 1 << 20)
    assert arena_bytes(arena.layout, arena.slots) == (1 << 20) * (MIB + PAGE)
    for slot in (5, 77_777, 1_000_000):
        arena.allocate(slot)
    assert pages_taken(arena) == 3 * 257
    arena.slot(5)[0][:] = 1
    arena.punch(5)
    assert pages_taken(arena) == 2 * 257


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 1300), min_size=1, max_size=2),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=20),
)
def test_a_slot_takes_no_page_outside_of_it(pages: list[int], aligned: bool, changes: list[tuple[int, bool]]) -> None:
    """Whatever the size of pages."""
    sizes = [count * PAGE if aligned else count * PAGE - 100 for count in pages]
    arena = Arena.create("test", layout(*sizes), 6)
    taken: list[set[int]] = [set() for _ in sizes]
    for slot, allocated in [(5, True), *changes]:
        (arena.allocate if allocated else arena.punch)(slot)
        for size, of_component in zip(sizes, taken, strict=True):
            first, last = slot * size, (slot + 1) * size
            if allocated:
                of_component.update(range(first // PAGE, -(-last // PAGE)))
            else:
                of_component.difference_update(range(-(-first // PAGE), last // PAGE))
        assert pages_taken(arena) == sum(map(len, taken))
    arena.mapping.close()


def test_slots_lie_in_large_pages_where_the_kernel_has_them() -> None:
    counters = list(SETTINGS.glob("hugepages-*kB/stats/shmem_alloc"))
    if not shared_page_bytes() or not counters:
        pytest.skip("the kernel gives shared memory no large pages (as root, echo advise > …/shmem_enabled)")
    before = sum(int(counter.read_text()) for counter in counters)
    arena = Arena.create("test", layout(5 * MIB + PAGE), 8)
    with ThreadPoolExecutor() as threads:
        list(threads.map(arena.allocate, range(8)))
    assert sum(int(counter.read_text()) for counter in counters) >= before + 8
    for slot in range(8):
        arena.slot(slot)[0][:] = slot
    for slot in range(0, 8, 2):
        arena.punch(slot)
    assert pages_taken(arena) == 4 * (5 * MIB // PAGE + 1)
    assert all((arena.slot(slot)[0] == slot).all() for slot in range(1, 8, 2))


def test_a_slot_that_will_be_copied_into_has_its_pages_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena.create("test", MIXED, 3)
    seen = reader_of(arena)
    seen.mapping.become_private()
    seen.targets(1)
    assert not pages_taken(arena), "what is another process's is not taken for it"
    arena.targets(1)
    taken = pages_taken(arena)
    assert taken and arena.allocated.tolist() == [False, True, False]
    arena.targets(1)
    assert pages_taken(arena) == taken
    arena.punch(1)
    assert not arena.allocated.any()

    def no_room(offset: int, nbytes: int) -> None:
        raise ConfigError("no room for it")

    monkeypatch.setattr(arena.mapping, "allocate", no_room)
    with pytest.raises(LoadError, match="no room for it"):
        arena.targets(1)
    assert not arena.allocated.any()


def test_memory_for_other_records_is_refused() -> None:
    arena = Arena.create("test", layout(PAGE), 8)
    with pytest.raises(PeerMemoryError, match=f"{8 * PAGE} bytes where {16 * PAGE}"):
        Arena.attach(arena.mapping.reader_descriptor(), layout(2 * PAGE), 8)


def test_kernels_tensors_lie_in_shared_memory() -> None:
    torch = pytest.importorskip("torch")
    from vllm_moe_offload.integration.tensors import as_weights, record_layout

    arena = Arena.create("test", record_layout({"w13": torch.zeros(4, 8, 16, dtype=torch.bfloat16)}), 10)
    seen = reader_of(arena)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w13 = as_weights(seen.layout, [tensor[2:6] for tensor in seen.tensors()])["w13"]
    arena.components[0].view(np.int16).reshape(10, 8, 16)[2:6] = np.arange(4)[:, None, None]
    assert w13.shape == (4, 8, 16)
    assert w13.data_ptr() == seen.components[0][2].ctypes.data
    assert (w13.view(torch.int16)[3] == 3).all()
