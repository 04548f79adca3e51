"""Whatever happens to the files, a damaged or foreign store is noticed and built again, never served."""

import os
import random
from pathlib import Path

import pytest
from store_samples import EXPERTS, LAYERS, LAYOUT, build

from tests.log_lines import log_lines
from vllm_moe_offload.store import Store, StoreIdentity, StoreRoot, UnusableStoreError


def flip(path: Path, byte: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def assert_rebuilt(root: StoreRoot, identity: StoreIdentity, why: str) -> None:
    with log_lines() as said:
        store = build(root, identity)
    assert len(said) == 1 and why in said[0] and str(store.path) in said[0] and "building it again" in said[0]
    assert store.verify() == []
    assert [info.state for info in root.ls()] == ["complete"]


@pytest.mark.parametrize("keep", [0, 1, 4096, EXPERTS * 12288 * 2 - 1])
def test_truncated_records(root: StoreRoot, identity: StoreIdentity, keep: int) -> None:
    os.truncate(build(root, identity).path / "records.bin", keep)
    assert_rebuilt(root, identity, f"records.bin has {keep} bytes, not {EXPERTS * 12288 * 2}")


def test_grown_records(root: StoreRoot, identity: StoreIdentity) -> None:
    path = build(root, identity).path / "records.bin"
    os.truncate(path, path.stat().st_size + 4096)
    assert_rebuilt(root, identity, "records.bin has")


@pytest.mark.parametrize("name", ["records.bin", "manifest.json"])
def test_a_missing_file(root: StoreRoot, identity: StoreIdentity, name: str) -> None:
    (build(root, identity).path / name).unlink()
    assert_rebuilt(root, identity, f"{name} is missing")


def test_every_cut_of_the_manifest(root: StoreRoot, identity: StoreIdentity) -> None:
    path = build(root, identity).path / "manifest.json"
    text = path.read_bytes()
    for length in range(len(text)):
        path.write_bytes(text[:length])
        with pytest.raises(UnusableStoreError, match=str(path.parent)):
            Store.open(path.parent, identity)
    assert_rebuilt(root, identity, "manifest.json")


def test_any_flipped_bit_of_the_manifest(root: StoreRoot, identity: StoreIdentity) -> None:
    path = build(root, identity).path / "manifest.json"
    text, rng = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(text)
        damaged[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UnusableStoreError, match=str(path.parent)):
            Store.open(path.parent, identity)
    assert_rebuilt(root, identity, "manifest.json")


def test_another_format_version(root: StoreRoot, identity: StoreIdentity) -> None:
    path = build(root, identity).path / "manifest.json"
    path.write_text(path.read_text().replace('"format_version":3', '"format_version":1'))
    assert [info.state for info in root.prunable()] == ["outdated"]
    assert_rebuilt(root, identity, "format version 1, this package reads 3")


def test_a_store_of_another_identity_at_our_place(root: StoreRoot, identity: StoreIdentity) -> None:
    foreign = StoreIdentity({**identity.facts, "vllm": "0.31.0"})
    build(root, foreign).path.rename(root.path / identity.fingerprint)
    assert_rebuilt(root, identity, "differing in vllm")


@pytest.mark.usefixtures("silent")
def test_identities_get_stores_of_their_own(root: StoreRoot, identity: StoreIdentity) -> None:
    rank1 = StoreIdentity({**identity.facts, "parallel": {"tp_rank": 1, "tp_size": 1}})
    paths = {build(root, one).path for one in (identity, rank1)}
    assert len(paths) == 2


def test_flipped_bits_are_found_by_verify_and_by_digest(root: StoreRoot, identity: StoreIdentity) -> None:
    store = build(root, identity)
    path = store.path / "records.bin"
    rng = random.Random(1)
    for layer_index, name in enumerate(LAYERS):
        for expert in range(EXPERTS):
            offset = store.offset(layer_index, expert)
            where, bit = offset + rng.choice([rng.randrange(6000), 8192 + rng.randrange(4)]), rng.randrange(8)
            flip(path, where, bit)
            record = memoryview(path.read_bytes())[offset : offset + LAYOUT.record_bytes]
            assert store.verify() == [(name, expert)]
            assert Store.record_digest(LAYOUT.parts(record)) != store.checksum(layer_index, expert)
            flip(path, where, bit)
    assert store.verify() == []


def test_a_store_cut_while_open_fails_verification(root: StoreRoot, identity: StoreIdentity) -> None:
    store = build(root, identity)
    os.truncate(store.path / "records.bin", store.offset(1, 3))
    assert store.verify() == [(LAYERS[1], 3), (LAYERS[1], 4)]


@pytest.mark.usefixtures("silent")
def test_a_store_set_aside_is_never_believed_again(root: StoreRoot, identity: StoreIdentity) -> None:
    store = build(root, identity)
    root.set_aside(store, "record (3, 7) has a wrong checksum")
    assert store.verify() == []
    (info,) = root.ls()
    assert (info.state, info.detail) == ("damaged", "record (3, 7) has a wrong checksum")
    rebuilt = build(root, identity)
    assert [info.state for info in root.ls()] == ["complete"]

    root.set_aside(store, "the old one again")
    assert [info.state for info in root.ls()] == ["complete"]
    assert rebuilt.path.exists()
