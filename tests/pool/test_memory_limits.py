"""Slot memory: real pages, taken when filled, one array per component; and how much of it a process may take."""

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from vllm_moe_offload.pool import HostMemory
from vllm_moe_offload.pool.memory_limits import equal_share, memory_limits, room_on_nodes
from vllm_moe_offload.store import Component, RecordLayout

MIB = 2**20


def layout(*sizes: int) -> RecordLayout:
    return RecordLayout(tuple(Component(f"part{i}", "uint8", (size,), size) for i, size in enumerate(sizes)))


def test_slots_are_dense_page_aligned_and_apart() -> None:
    pool = HostMemory(layout(8192, 100, 0), 5)
    assert [component.shape for component in pool.components] == [(5, 8192), (5, 100), (5, 0)]
    for component in pool.components[:2]:
        assert component.flags.c_contiguous and component.flags.writeable
        assert component.ctypes.data % mmap.PAGESIZE == 0
    for slot in range(5):
        for part in pool.targets(slot):
            part[:] = slot + 1
    for slot in range(5):
        assert all((part == slot + 1).all() for part in pool.targets(slot))


def test_memory_is_taken_when_a_slot_is_filled() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = HostMemory(layout(MIB), 256)
    assert process.memory_info().rss - before < 16 * MIB
    for slot in range(64):
        pool.targets(slot)[0][:] = 1
    assert 56 * MIB < process.memory_info().rss - before < 96 * MIB
    assert not pool.targets(200)[0].any()


def test_no_more_is_available_than_the_machine_has() -> None:
    assert 0 < min(memory_limits().values()) <= psutil.virtual_memory().total


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A memory control group of 300 MiB."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"moe-offload-test-{os.getpid()}"
        if not (Path(root) / "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / limit).exists():
            (group / limit).write_text(str(300 * MIB))
            yield group
            group.rmdir()
            return
        group.rmdir()
    pytest.skip("no memory control groups to make here")


USE = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
from vllm_moe_offload.pool.memory_limits import memory_limits
before = min(memory_limits().values())
taken = bytearray(b"x") * (100 << 20)
after_memory = min(memory_limits().values())
with open(sys.argv[2], "wb") as file:
    file.write(taken)
    os.fsync(file.fileno())
print(before, after_memory, min(memory_limits().values()))
"""


def test_the_tightest_control_group_counts_and_its_page_cache_is_room(memory_group: Path, tmp_path: Path) -> None:
    inner = memory_group / "inner"
    inner.mkdir()
    try:
        output = subprocess.check_output([sys.executable, "-c", USE, str(inner), str(tmp_path / "file")], text=True)
    finally:
        inner.rmdir()
    before, after_memory, after_file = map(int, output.split())
    assert 200 * MIB < before <= 300 * MIB
    assert 90 * MIB < before - after_memory < 130 * MIB
    assert abs(after_memory - after_file) < 40 * MIB


def test_components_do_not_share_memory() -> None:
    pool = HostMemory(layout(4096, 4096), 2)
    assert not np.shares_memory(*pool.components)


GIB = 2**30


def test_processes_that_share_memory_get_equal_parts_of_what_the_last_to_look_saw() -> None:
    workers = [{"a machine": 100 * GIB}, {"a machine": 96 * GIB}, {"b machine": 50 * GIB}, {"a machine": 99 * GIB}]
    assert [equal_share(workers, number) for number in range(4)] == [32 * GIB, 32 * GIB, 50 * GIB, 32 * GIB]


def test_the_tightest_bound_decides_whoever_it_is_shared_with() -> None:
    machine = {"a machine": 100 * GIB}
    workers = [machine | {"a nodes 0": 30 * GIB}, machine | {"a nodes 1": 60 * GIB}, machine | {"a cgroup 7": 8 * GIB}]
    assert [equal_share(workers, number) for number in range(3)] == [30 * GIB, 100 * GIB // 3, 8 * GIB]


def test_two_processes_of_this_machine_share_what_one_would_have() -> None:
    limits = memory_limits()
    assert equal_share([limits], 0) == min(limits.values())
    assert equal_share([limits, limits], 1) == min(limits.values()) // 2


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    """The kernel's folder of a machine with memory on two nodes, 3 GiB free on the first and 5 GiB on the second."""
    (tmp_path / "has_memory").write_text("0-1\n")
    for node, free in enumerate((3, 5)):
        lines = {"MemTotal": 64 * GIB, "MemFree": free * GIB - 3 * MIB} | dict.fromkeys(
            ("Active(file)", "Inactive(file)", "SReclaimable"), MIB
        )
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        (folder / "meminfo").write_text(
            "".join(f"Node {node} {name}: {size // 1024} kB\n" for name, size in lines.items())
        )
    return tmp_path


@pytest.mark.parametrize(
    ("policy", "room"),
    [("bind:0", {"nodes 0": 3 * GIB}), ("bind:1", {"nodes 1": 5 * GIB}), ("bind:0-1", {}), ("default", {})],
)
def test_a_process_bound_to_some_nodes_has_only_their_memory(
    two_nodes: Path, policy: str, room: dict[str, int]
) -> None:
    numa_maps = f"55d0 bind:1 heap anon=10\n7ffc {policy} stack anon=4 N0=4 kernelpagesize_kB=4\n7f00 default anon=2\n"
    assert room_on_nodes(numa_maps, two_nodes) == room
