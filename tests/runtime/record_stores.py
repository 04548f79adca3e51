"""Real stores of random records on disk, and what their records must be."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload.pool import HostMemory
from vllm_moe_offload.store import Component, RecordLayout, Store, StoreIdentity, StoreRoot, StoreWriter

Parts = list[NDArray[np.uint8]]


def layout(*sizes: int) -> RecordLayout:
    return RecordLayout(tuple(Component(f"part{i}", "uint8", (size,), size) for i, size in enumerate(sizes)))


ALIGNED = layout(8192, 4096)
ODD = layout(6000, 4)
MIXED = layout(4096, 100, 8192, 1)
LAYOUTS = {"aligned": ALIGNED, "odd": ODD, "mixed": MIXED}


@dataclass
class RecordStore:
    """An open store with the bytes that were put into it: ``records[layer][expert]`` are a record's parts."""

    store: Store
    records: list[list[Parts]]

    @property
    def file(self) -> Path:
        return self.store.path / "records.bin"

    def flip(self, layer: int, expert: int, byte: int = 0) -> None:
        """Turn one bit of a record on disk around; a second time, back."""
        offset = self.store.offset(layer, expert) + byte
        with self.file.open("r+b") as file:
            file.seek(offset)
            value = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([value ^ 16]))

    def holds(self, pool: HostMemory, slot: int, layer: int, expert: int) -> bool:
        """Whether a slot has exactly the bytes of a record."""
        expected = self.records[layer][expert]
        found = (component[slot] for component in pool.components)
        return all(np.array_equal(mine, right) for mine, right in zip(found, expected, strict=True))


def build_store(root: Path, layers: Sequence[tuple[RecordLayout, int]], seed: int = 0) -> RecordStore:
    """A store whose layers have these layouts and numbers of experts, called ``layer 0``, ``layer 1``, …"""
    draw = np.random.default_rng(seed)
    writer = StoreRoot(root).open_or_build(StoreIdentity({"seed": seed, "layers": str(layers)}))
    assert isinstance(writer, StoreWriter)
    records = []
    for index, (shape, experts) in enumerate(layers):
        data = [draw.integers(0, 256, (experts, part.nbytes), np.uint8) for part in shape.components]
        writer.add_layer(f"layer {index}", shape, data)
        records.append([[component[expert] for component in data] for expert in range(experts)])
    return RecordStore(writer.finish(), records)
