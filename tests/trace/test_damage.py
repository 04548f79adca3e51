"""A history file may be damaged at any byte: the engine starts empty, the file is kept aside, and nothing is raised."""

import io
import random
import struct
import threading
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_trace_file import make_trace, same

from vllm_moe_offload.errors import TraceError
from vllm_moe_offload.learning.heads_file import read_heads, write_heads
from vllm_moe_offload.predict.network import NetworkSize, Parameters
from vllm_moe_offload.predict.token_vectors import LearnedVectors
from vllm_moe_offload.trace.archive import HistoryArchive
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace

SHAPE = (4, 8, 2)
FLIPS = 300


@pytest.fixture
def archive(tmp_path: Path) -> HistoryArchive:
    archive, store = HistoryArchive(tmp_path), HistoryStore(SHAPE)
    store.extend(make_trace((3, 2, 5)).requests())
    archive.save("aa", store)
    return archive


def kept(store: HistoryStore) -> Trace:
    return replace(store.to_trace(), model="", fingerprint="")


def test_any_flipped_bit_is_noticed_or_changes_nothing(archive: HistoryArchive) -> None:
    path = archive.path("aa")
    whole, original = path.read_bytes(), kept(archive.load("aa", SHAPE)[0])
    draw, unusable = random.Random(1), 0
    for place in draw.sample(range(len(whole)), FLIPS):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        outline = archive.outline("aa")
        store, problem = archive.load("aa", SHAPE)
        if problem is None:
            assert same(kept(store), original), f"byte {place}"
            assert outline in (None, (10, SHAPE))
        else:
            unusable += 1
            assert store.num_tokens == 0 and not path.exists()
            (aside,) = path.parent.glob("*.unusable-*")
            assert aside.read_bytes() == changed, "what cannot be used is kept"
            aside.unlink()
    assert unusable > FLIPS / 2


def test_a_file_that_ends_too_early_is_set_aside_wherever_it_ends(archive: HistoryArchive) -> None:
    path = archive.path("aa")
    whole = path.read_bytes()
    for length in range(0, len(whole), 11):
        path.write_bytes(whole[:length])
        store, problem = archive.load("aa", SHAPE)
        assert store.num_tokens == 0 and problem is not None and "set aside as" in problem
        for aside in path.parent.glob("*.unusable-*"):
            aside.unlink()


def header(shape: object, kind: str = "|u1") -> bytes:
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npy(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        {"experts": header((1 << 40, 1, 1))},
        {"experts": header((1 << 62, 1 << 62, 4))},
        {"experts": header((-1, 1, 1))},
        {"experts": header((1,), "|O")},
        {"model": header((), "|O")},
        {"experts": b"\x93NUMPY\x11\x03"},
        {"experts": b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000) + b"(" * 60000},
        {"num_experts": npy(np.array(-3))},
        {"num_experts": npy(np.array(1 << 63, np.uint64))},
        {"tokens": npy(np.array([1 << 40]))},
        {"embeddings": npy(np.array([[np.nan]]))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_file_claims_is_never_believed_beyond_its_size(tmp_path: Path, change: dict[str, bytes]) -> None:
    fields = {
        "experts": npy(np.zeros((1, 1, 1), np.uint8)),
        "weights": npy(np.ones((1, 1, 1), np.float16)),
        "offsets": npy(np.array([0, 1])),
        "num_experts": npy(np.array(4)),
    }
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        for name, content in (fields | change).items():
            archive.writestr(f"{name}.npy", content)
    tracemalloc.start()
    try:
        with pytest.raises(TraceError, match=r"t\.npz"):
            read_trace(tmp_path / "t.npz")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_heads_with_any_flipped_bit_are_refused_or_the_same(tmp_path: Path) -> None:
    path, size = tmp_path / "heads.npz", NetworkSize(1, 2, 2, 2, 2)
    write_heads(path, "ab", Parameters.random(size, np.random.default_rng(0)), LearnedVectors(2), [make_trace((7,))])
    whole, original = path.read_bytes(), read_heads(path, "ab", size, learned=True)
    draw = random.Random(2)
    for place in draw.sample(range(len(whole)), FLIPS):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            heads = read_heads(path, "ab", size, learned=True)
        except TraceError:
            continue
        assert np.array_equal(heads.parameters.flat, original.parameters.flat) and heads.trained_tokens == 7


def test_ranks_that_find_the_same_damaged_file_all_start(tmp_path: Path) -> None:
    for number in range(30):
        archive = HistoryArchive(tmp_path / str(number))
        archive.path("aa").parent.mkdir(parents=True)
        archive.path("aa").write_bytes(b"damaged")
        together, found, raised = threading.Barrier(3), [], []

        def rank(archive=archive, together=together, found=found, raised=raised) -> None:
            together.wait(30)
            try:
                found.append(archive.load("aa", SHAPE))
            except BaseException as error:
                raised.append(error)

        ranks = [threading.Thread(target=rank) for _ in range(3)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join(30)
        assert not raised and len(found) == 3
        assert [store.num_tokens for store, _ in found] == [0, 0, 0]
        assert len(list(archive.path("aa").parent.glob("*.unusable-*"))) == 1
