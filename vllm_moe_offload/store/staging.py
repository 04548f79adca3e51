"""One layer's records as they will lie on disk, in memory that is given back as it is written.

Must never hold more than one layer.
"""

import mmap
from collections.abc import Sequence

import numpy as np
from numpy import uint8
from numpy.typing import NDArray

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store.files import aligned_buffer
from vllm_moe_offload.store.layout import RecordLayout, record_digest


class Stage:
    """A page-aligned buffer for the records of one layer at a time; zero wherever nothing was put."""

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


def check_components(name: str, layout: RecordLayout, components: Sequence[NDArray[uint8]]) -> None:
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


def digests(layout: RecordLayout, records: memoryview) -> list[int]:
    """`record_digest` of each record in `records`."""
    size = layout.record_bytes
    return [record_digest(layout.parts(records[at : at + size])) for at in range(0, len(records), size)]
