"""The table: both sides see the same arrays, no line is anybody else's, and a foreign table is refused by name."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.ipc import table as tables
from vllm_moe_offload.ipc.protocol import MAX_WORKERS
from vllm_moe_offload.ipc.shm import Mapping, PeerMemoryError
from vllm_moe_offload.ipc.table import ABSENT, RING, ResidencyTable, table_bytes
from vllm_moe_offload.stats import WORKER_STATISTICS

LINE = 64
PER_WORKER = ("entries", "stats", "expected", "uses")


def attach(table: ResidencyTable) -> ResidencyTable:
    return ResidencyTable.attach(os.dup(table.mapping.fd), table.experts)


def span(array: np.ndarray) -> range:
    steps = zip(array.shape, array.strides, strict=True)
    return range(array.ctypes.data, array.ctypes.data + sum((n - 1) * step for n, step in steps) + array.itemsize)


def test_a_new_table_is_empty_and_seen_by_who_attaches() -> None:
    table = ResidencyTable.create("test", 100)
    worker = attach(table)
    assert (worker.epoch, worker.experts) == (1, 100)
    assert (worker.slot_of == ABSENT).all() and len(worker.slot_of) == 100
    for name in ("loading", *PER_WORKER):
        assert not getattr(worker, name).any()
    table.slot_of[7] = 70
    worker.done[5] = 9
    worker.expected[5, 99] = 0.5
    assert worker.slot_of[7] == 70 and table.done[5] == 9 and table.expected[5, 99] == 0.5


@settings(deadline=None)
@given(st.integers(1, 20_000))
def test_parts_are_apart_and_workers_share_no_cache_line(experts: int) -> None:
    table = ResidencyTable.create("test", experts)
    whole = [table.header, table.slot_of, table.loading, table.entries, table.stats, table.expected, table.uses]
    spans = sorted((span(array) for array in whole), key=lambda part: part.start)
    assert all(one.stop <= other.start for one, other in itertools.pairwise(spans))
    assert span(whole[0]).start == table.mapping.address
    assert spans[-1].stop <= table.mapping.address + table_bytes(experts)
    for name in PER_WORKER:
        array = getattr(table, name)
        assert len(array) == MAX_WORKERS
        assert array[1].ctypes.data % LINE == 0
        assert span(array[0]).stop <= array[1].ctypes.data
    for column in (table.active, table.done, table.head):
        assert all(np.shares_memory(column[w : w + 1], table.entries[w]) for w in range(MAX_WORKERS))
    assert not np.shares_memory(table.active, table.done) and not np.shares_memory(table.done, table.head)
    epoch, limit = tables.EPOCH * 8 // LINE, tables.LIMIT * 8 // LINE
    assert len({0, epoch, limit}) == 3
    table.close()


def test_memory_is_taken_for_workers_that_come() -> None:
    table = ResidencyTable.create("test", 6144)
    attach(table)
    assert table_bytes(6144) > 16 << 20
    assert os.fstat(table.mapping.fd).st_blocks * 512 <= 32 << 10


@pytest.mark.parametrize(
    ("word", "value", "reason"),
    [
        (0, 0, "magic number 0"),
        (1, 99, "version 99, this worker needs"),
        (2, 101, "number of experts 101, this worker needs 100"),
        (3, 8, "number of workers 8"),
        (4, 16, "size of rings 16"),
        (5, 3, "statistics 3"),
    ],
)
def test_another_table_is_refused_by_name(word: int, value: int, reason: str) -> None:
    table = ResidencyTable.create("test", 100)
    table.header[word] = value
    fd = os.dup(table.mapping.fd)
    with pytest.raises(PeerMemoryError, match=reason) as refusal:
        ResidencyTable.attach(fd, 100)
    assert "one version" in str(refusal.value)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_memory_of_another_size_or_without_seals_is_refused() -> None:
    small = ResidencyTable.create("test", 100)
    with pytest.raises(PeerMemoryError, match="bytes where"):
        ResidencyTable.attach(os.dup(small.mapping.fd), 100_000)
    fd = os.memfd_create("bare")
    os.ftruncate(fd, table_bytes(100))
    with pytest.raises(PeerMemoryError, match="seals"):
        ResidencyTable.attach(fd, 100)
    with pytest.raises(PeerMemoryError, match="not open for writing"):
        ResidencyTable.attach(small.mapping.reader_descriptor(), 100)
    with pytest.raises(PeerMemoryError, match="magic number 0"):
        ResidencyTable.attach(Mapping.create("zeros", table_bytes(100)).fd, 100)


def test_clearing_a_worker_spares_the_others() -> None:
    table = ResidencyTable.create("test", 50)
    for name in PER_WORKER:
        getattr(table, name)[3:6] = 2
    table.clear(4)
    for name in ("entries", "stats", "expected"):
        assert not getattr(table, name)[4].any()
        assert (getattr(table, name)[[3, 5]] == 2).all()
    assert (table.active[[3, 4, 5]] == [2, 0, 2]).all()


def test_there_is_a_word_per_statistic() -> None:
    table = ResidencyTable.create("test", 1)
    assert table.stats.shape == (MAX_WORKERS, len(WORKER_STATISTICS)) and table.uses.shape == (MAX_WORKERS, RING)
