"""Where each part of an expert lies inside its record. Pure arithmetic; must never depend on what the bytes mean."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import xxhash
from numpy import uint8
from numpy.typing import NDArray

from vllm_moe_offload.errors import StoreError

ALIGNMENT = 4096


def align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Component:
    """One expert's part of one tensor, e.g. `("w13_weight", "bfloat16", (128, 192), 49152)`; `nbytes` is unpadded."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class RecordLayout:
    """The components of a record in order, each starting on a multiple of `ALIGNMENT`; gaps are zero.

    Raises StoreError for a layout without bytes, with a negative size, or with a name given twice.
    """

    components: tuple[Component, ...]

    def __post_init__(self) -> None:
        names = [component.name for component in self.components]
        if len(set(names)) < len(names):
            raise StoreError(f"record layout names a component twice: {names}")
        if self.payload_bytes <= 0 or min(component.nbytes for component in self.components) < 0:
            raise StoreError(f"record layout has no bytes or a negative size: {self.components}")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Byte offset of each component inside the record."""
        starts = [0]
        for component in self.components[:-1]:
            starts.append(starts[-1] + align(component.nbytes))
        return tuple(starts)

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of a whole record with padding, a multiple of `ALIGNMENT`."""
        return sum(align(component.nbytes) for component in self.components)

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of a record without padding."""
        return sum(component.nbytes for component in self.components)

    def parts(self, record: memoryview) -> list[memoryview]:
        """The component payloads inside `record`, a view of `record_bytes` bytes."""
        return [
            record[start : start + component.nbytes]
            for start, component in zip(self.offsets, self.components, strict=True)
        ]


def record_digest(parts: Iterable[memoryview | NDArray[uint8]]) -> int:
    """xxh3_64 over the component payloads in order, padding excluded; each part is one C-contiguous buffer."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)  # type: ignore[arg-type]  # an ndarray is a buffer, to mypy only from 3.12
    return digest.intdigest()
