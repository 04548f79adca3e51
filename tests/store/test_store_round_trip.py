"""What is written is what is read, for any layout, and the layout is what kernels and disks need."""

import ctypes
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import EXPERTS, LAYERS, LAYOUT, build, layer_bytes

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store import (
    ALIGNMENT,
    Component,
    LayerTensor,
    RecordLayout,
    Store,
    StoreIdentity,
    StoreRoot,
    StoreWriter,
)

sizes = st.one_of(st.integers(1, 40), st.sampled_from([4095, 4096, 4097, 12288]), st.integers(1, 30000))
layouts = st.lists(sizes, min_size=1, max_size=4).map(
    lambda nbytes: RecordLayout(tuple(Component(f"c{i}", "uint8", (n,), n) for i, n in enumerate(nbytes)))
)


def read(store: Store, layer_index: int, expert: int) -> bytes:
    size = store.layers[layer_index].layout.record_bytes
    with mmap.mmap(-1, size) as buffer:
        assert os.preadv(store.fd, [buffer], store.offset(layer_index, expert)) == size
        return bytes(buffer)


@settings(deadline=None)
@given(layouts)
def test_components_are_aligned_and_do_not_overlap(layout: RecordLayout) -> None:
    ends = [start + part.nbytes for start, part in zip(layout.offsets, layout.components, strict=True)]
    assert all(start % ALIGNMENT == 0 for start in layout.offsets)
    assert all(end <= start for end, start in zip(ends, layout.offsets[1:], strict=False))
    assert layout.record_bytes % ALIGNMENT == 0
    assert ends[-1] <= layout.record_bytes < ends[-1] + ALIGNMENT
    assert layout.payload_bytes == sum(part.nbytes for part in layout.components)


@pytest.mark.usefixtures("silent")
@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(layouts, st.integers(1, 6)), min_size=1, max_size=4))
def test_every_record_comes_back(shapes: list[tuple[RecordLayout, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, identity = StoreRoot(Path(folder)), StoreIdentity({"a": 1})
        writer = root.open_or_build(identity)
        assert isinstance(writer, StoreWriter)
        written = [layer_bytes(seed, layout, experts) for seed, (layout, experts) in enumerate(shapes)]
        for index, components in enumerate(written):
            given_away = [data.copy() for data in components]
            writer.add_layer(f"layer {index}", shapes[index][0], given_away)
            for data in given_away:
                data.fill(0)
        writer.finish().close()

        store = root.open_or_build(identity)
        assert isinstance(store, Store)
        first_record = 0
        for index, (layout, experts) in enumerate(shapes):
            entry = store.layers[index]
            assert (entry.name, entry.experts, entry.layout) == (f"layer {index}", experts, layout)
            assert entry.first_record == first_record
            first_record += experts
            for expert in range(experts):
                record = read(store, index, expert)
                rows = [data[expert] for data in written[index]]
                expected = bytearray(layout.record_bytes)
                for start, row in zip(layout.offsets, rows, strict=True):
                    expected[start : start + len(row)] = row.tobytes()
                assert record == expected
                assert Store.record_digest(rows) == store.checksum(index, expert)
                assert Store.record_digest(layout.parts(memoryview(record))) == store.checksum(index, expert)
        assert store.verify() == []
        store.close()


def test_tensors_of_a_layer_come_back_bit_for_bit(root: StoreRoot, identity: StoreIdentity) -> None:
    writer = root.open_or_build(identity)
    assert isinstance(writer, StoreWriter)
    scale = LayerTensor("w13_input_scale", "float32", (), np.float32(0.1).tobytes())
    table = LayerTensor("lookup", "uint8", (2, 128), bytes(range(256)))
    writer.add_layer("with", LAYOUT, layer_bytes(0), [scale, table])
    writer.add_layer("without", LAYOUT, layer_bytes(1))
    writer.finish().close()
    store = root.open_or_build(identity)
    assert isinstance(store, Store)
    assert [layer.tensors for layer in store.layers] == [[scale, table], []]
    store.close()


def test_progress_reaches_the_announced_total(root: StoreRoot, identity: StoreIdentity) -> None:
    writer = root.open_or_build(identity)
    assert isinstance(writer, StoreWriter)
    total, written = len(LAYERS) * EXPERTS * LAYOUT.record_bytes, []
    writer.progress = written.append
    writer.expect(total)
    for seed, name in enumerate(LAYERS):
        writer.add_layer(name, LAYOUT, layer_bytes(seed))
    store = writer.finish()
    assert written == sorted(written) and written[-1] == total == store.data_bytes
    checked: list[int] = []
    store.verify(checked.append)
    assert checked == sorted(checked) and checked[-1] == total


def test_building_and_reading_leave_the_page_cache_alone(root: StoreRoot, identity: StoreIdentity) -> None:
    store = build(root, identity)
    if not store.direct:
        pytest.skip(f"{root.path} has no O_DIRECT")
    store.verify()
    assert cached_pages(store.path / "records.bin") == 0


def cached_pages(path: Path) -> int:
    """Pages of `path` in the page cache, from mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), vector) == 0
        return sum(flag & 1 for flag in vector)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(
    ("components", "complaint"),
    [
        ([np.zeros((2, 6000), np.uint8)], "1 arrays for 2 components"),
        ([np.zeros((2, 6000), np.uint8), np.zeros((2, 5), np.uint8)], "component scale"),
        ([np.zeros((2, 6000), np.uint8), np.zeros((3, 4), np.uint8)], "component scale"),
        ([np.zeros((2, 6000), np.int8), np.zeros((2, 4), np.uint8)], "int8"),
        ([np.zeros((0, 6000), np.uint8), np.zeros((0, 4), np.uint8)], "1 or more experts"),
    ],
)
def test_wrong_arrays_are_refused_and_the_build_ends(
    root: StoreRoot, identity: StoreIdentity, components: list[np.ndarray], complaint: str
) -> None:
    writer = root.open_or_build(identity)
    assert isinstance(writer, StoreWriter)
    with pytest.raises(StoreError, match=complaint):
        writer.add_layer("layer", LAYOUT, components)
    assert root.ls() == []
    build(root, identity).close()


def test_a_layer_twice_or_no_layer_at_all_is_refused(root: StoreRoot, identity: StoreIdentity) -> None:
    writer = root.open_or_build(identity)
    assert isinstance(writer, StoreWriter)
    writer.add_layer("layer", LAYOUT, layer_bytes(0))
    with pytest.raises(StoreError, match="added to the store before"):
        writer.add_layer("layer", LAYOUT, layer_bytes(0))
    writer = root.open_or_build(identity)
    assert isinstance(writer, StoreWriter)
    with pytest.raises(StoreError, match="no layers"):
        writer.finish()


@pytest.mark.usefixtures("silent")
def test_readers_outlive_the_files(root: StoreRoot, identity: StoreIdentity) -> None:
    store = build(root, identity)
    root.prune(root.prunable(everything=True))
    assert not store.path.exists()
    assert store.verify() == []
