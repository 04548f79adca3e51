"""Two checkpoints that could give different records never share a fingerprint; one checkpoint keeps its own."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store import StoreIdentity, checkpoint_identity

scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.text('ab"\\é', max_size=5))
fact_names = st.sampled_from(["vllm", "dtype", "isa", "rank"])
facts = st.dictionaries(fact_names, st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=5)


def write_safetensors(path: Path, values: np.ndarray) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": values.shape, "data_offsets": [0, values.nbytes]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.astype(np.float32).tobytes())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"num_experts": 4}')
    write_safetensors(folder / "model.safetensors", np.arange(100_000))
    return folder


def set_time(path: Path, nanoseconds: int) -> None:
    os.utime(path, ns=(nanoseconds, nanoseconds))


@settings(deadline=None)
@given(facts, facts)
def test_fingerprints_agree_exactly_when_no_fact_differs(ours: dict, theirs: dict) -> None:
    left, right = StoreIdentity(ours), StoreIdentity(theirs)
    assert (left.fingerprint == right.fingerprint) == (left.differences(right) == [])
    assert left.differences(right) == right.differences(left)
    assert StoreIdentity(json.loads(json.dumps(ours))).fingerprint == left.fingerprint
    assert StoreIdentity(dict(reversed(ours.items()))).fingerprint == left.fingerprint


def test_differences_are_named_also_inside() -> None:
    ours = StoreIdentity({"vllm": "0.32.0", "parallel": {"tp_rank": 0, "tp_size": 2}, "dtype": "bfloat16"})
    theirs = StoreIdentity({"vllm": "0.31.0", "parallel": {"tp_rank": 1, "tp_size": 2}, "isa": "amx"})
    assert ours.differences(theirs) == ["dtype", "isa", "parallel.tp_rank", "vllm"]


def test_the_folder_is_no_part_of_the_fingerprint() -> None:
    assert StoreIdentity({"a": 1}, "/one").fingerprint == StoreIdentity({"a": 1}, "/two").fingerprint


def test_an_untouched_or_faithfully_copied_checkpoint_keeps_its_identity(checkpoint: Path, tmp_path: Path) -> None:
    before = checkpoint_identity(checkpoint)
    assert checkpoint_identity(checkpoint) == before
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert checkpoint_identity(tmp_path / "copy") == before


def test_other_weights_of_the_same_shape_are_another_checkpoint(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    time = weights.stat().st_mtime_ns
    before = checkpoint_identity(checkpoint)
    write_safetensors(weights, np.arange(100_000) + 1)
    set_time(weights, time)
    assert StoreIdentity(checkpoint_identity(checkpoint)).differences(StoreIdentity(before)) == [
        "model.safetensors.samples"
    ]


def test_one_edited_weight_is_another_checkpoint(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    before = checkpoint_identity(checkpoint)
    data = bytearray(weights.read_bytes())
    data[len(data) // 64 + 5000] ^= 1
    weights.write_bytes(data)
    set_time(weights, weights.stat().st_mtime_ns + 1)
    assert checkpoint_identity(checkpoint) != before


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", "model.safetensors.index.json"])
def test_configuration_counts(checkpoint: Path, name: str) -> None:
    before = checkpoint_identity(checkpoint)
    (checkpoint / name).write_text('{"num_experts": 8}')
    assert list(StoreIdentity(checkpoint_identity(checkpoint)).differences(StoreIdentity(before))) == [name]


def test_a_second_download_into_the_hub_cache_is_the_same(checkpoint: Path) -> None:
    weights, blobs = checkpoint / "model.safetensors", checkpoint.parent / "blobs"
    blobs.mkdir()
    blob = blobs / ("0123456789abcdef" * 4)
    weights.rename(blob)
    weights.symlink_to(blob)
    before = checkpoint_identity(checkpoint)
    set_time(blob, 10**18)
    assert checkpoint_identity(checkpoint) == before
    other = blobs / ("fedcba9876543210" * 4)
    blob.rename(other)
    weights.unlink()
    weights.symlink_to(other)
    assert checkpoint_identity(checkpoint) != before


def test_files_of_other_kinds_count_by_size_and_time(checkpoint: Path) -> None:
    weights = checkpoint / "pytorch_model.bin"
    weights.write_bytes(b"12345678")
    before = checkpoint_identity(checkpoint, ["*.bin"])
    assert set(before) == {"config.json", "pytorch_model.bin"}
    set_time(weights, weights.stat().st_mtime_ns + 1)
    assert checkpoint_identity(checkpoint, ["*.bin"]) != before


def test_a_folder_without_weights_is_refused(checkpoint: Path) -> None:
    with pytest.raises(StoreError, match=r"no file matches \*\.gguf"):
        checkpoint_identity(checkpoint, ["*.gguf"])
    with pytest.raises(StoreError, match="no checkpoint in"):
        checkpoint_identity(checkpoint / "missing")


@pytest.mark.parametrize("size", [0, 7, 20])
def test_a_safetensors_file_cut_inside_its_header_is_refused(checkpoint: Path, size: int) -> None:
    os.truncate(checkpoint / "model.safetensors", size)
    with pytest.raises(StoreError, match=r"model\.safetensors is not a whole safetensors file"):
        checkpoint_identity(checkpoint)
