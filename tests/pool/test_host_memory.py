"""Slots in host memory: what they take from the system, and in which pages."""

import re
from pathlib import Path

import numpy as np
import pytest

from vllm_moe_offload.pool import HostMemory
from vllm_moe_offload.pool.huge_pages import HUGE_PAGE_BYTES, private_huge_pages
from vllm_moe_offload.store.layout import Component, RecordLayout

SIZES = (3 * HUGE_PAGE_BYTES // 2, 4096, 100)


def layout(*sizes: int) -> RecordLayout:
    return RecordLayout(tuple(Component(f"part{i}", "uint8", (size,), size) for i, size in enumerate(sizes)))


def resident(part: np.ndarray) -> dict[str, int]:
    """Bytes of the mappings ``part`` lies in, by the kernel's names."""
    first, last = part.ctypes.data, part.ctypes.data + part.nbytes
    found = {"Rss": 0, "AnonHugePages": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if at := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(at[1], 16) < last and int(at[2], 16) > first
        elif inside and (name := line.split(":")[0]) in found:
            found[name] += 1024 * int(line.split()[1])
    return found


def test_slots_take_no_memory_before_they_are_written_and_no_more_than_theirs_after() -> None:
    pool = HostMemory(layout(*SIZES), 5)
    large = pool.components[0]
    assert resident(large)["Rss"] == 0
    for index in range(pool.slots):
        for part in pool.targets(index):
            part[:] = index + 1
    assert large.nbytes <= resident(large)["Rss"] <= large.nbytes + 4096
    for size, component in zip(SIZES, pool.components, strict=True):
        assert component.shape == (5, size) and component.ctypes.data % 4096 == 0
        assert [int(slot.min()) for slot in component] == [int(slot.max()) for slot in component] == [1, 2, 3, 4, 5]


@pytest.mark.skipif(not private_huge_pages(), reason="transparent huge pages are off")
def test_slots_lie_in_huge_pages() -> None:
    (component,) = HostMemory(layout(5 << 20), 7).components
    component[:] = 1
    assert resident(component)["AnonHugePages"] == component.nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
