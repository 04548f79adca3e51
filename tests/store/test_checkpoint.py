"""A checkpoint's files are known by their content alone, and read whole only once."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store import FileDigests, checkpoint

SIZE = 1 << 20


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(np.random.default_rng(3).bytes(SIZE))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read whole, by the real function."""
    read: list[Path] = []
    whole = checkpoint._sha256_of

    def counting(path: Path) -> str:
        read.append(path)
        return whole(path)

    monkeypatch.setattr(checkpoint, "_sha256_of", counting)
    return read


@pytest.fixture
def digests(tmp_path: Path, silent: None) -> FileDigests:
    return FileDigests(tmp_path / "stores")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def set_time(path: Path, nanoseconds: int) -> None:
    os.utime(path, ns=(nanoseconds, nanoseconds))


@pytest.mark.usefixtures("silent")
def test_it_is_the_content_read_once(digests: FileDigests, weights: Path, reads: list[Path], tmp_path: Path) -> None:
    assert digests.of([weights]) == [sha256(weights)]
    assert digests.of([weights, weights]) == [sha256(weights)] * 2
    assert FileDigests(tmp_path / "stores").of([weights]) == [sha256(weights)]
    assert reads == [weights]


def test_a_touched_or_copied_file_is_read_again_and_is_the_same(
    digests: FileDigests, weights: Path, reads: list[Path], tmp_path: Path
) -> None:
    before = digests.of([weights])
    set_time(weights, 10**18)
    copy = Path(shutil.copy(weights, tmp_path / "copy.safetensors"))
    assert digests.of([weights, copy]) == before * 2
    assert reads == [weights, weights, copy]


def test_one_bit_that_no_sample_sees_is_another_content(digests: FileDigests, weights: Path) -> None:
    before = digests.of([weights])
    data = bytearray(weights.read_bytes())
    data[SIZE // 64 + 5000] ^= 1
    weights.write_bytes(data)
    set_time(weights, weights.stat().st_mtime_ns + 1)
    assert digests.of([weights]) == [sha256(weights)] != before


def test_other_weights_with_the_same_size_and_time_are_another_content(digests: FileDigests, weights: Path) -> None:
    time, before = weights.stat().st_mtime_ns, digests.of([weights])
    weights.write_bytes(np.random.default_rng(4).bytes(SIZE))
    set_time(weights, time)
    assert digests.of([weights]) == [sha256(weights)] != before


def test_a_blob_of_the_hub_cache_is_known_by_its_name_and_equal_to_a_copy(
    digests: FileDigests, weights: Path, reads: list[Path], tmp_path: Path
) -> None:
    blob = tmp_path / "blobs" / sha256(weights)
    blob.parent.mkdir()
    shutil.copy(weights, blob)
    link = tmp_path / "snapshot.safetensors"
    link.symlink_to(blob)
    assert digests.of([link]) == [sha256(weights)] and reads == []
    assert digests.of([weights, link]) == [sha256(weights)] * 2 and reads == [weights]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"a": 1}', b"[]"])
def test_a_damaged_memory_is_made_anew(digests: FileDigests, weights: Path, tmp_path: Path, damage: bytes) -> None:
    digests.of([weights])
    (memory,) = (tmp_path / "stores").glob("file-digests-*.json")
    memory.write_bytes(damage)
    assert digests.of([weights]) == [sha256(weights)]
    assert len(memory.read_bytes()) > 64


def test_what_another_user_noted_is_not_believed(weights: Path, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    digests = FileDigests(tmp_path / "stores")
    digests.of([weights])
    (memory,) = (tmp_path / "stores").glob("file-digests-*.json")
    memory.write_text(memory.read_text().replace(sha256(weights), "0" * 64))
    assert digests.of([weights]) == ["0" * 64]
    os.chown(memory, 65534, 65534)
    assert digests.of([weights]) == [sha256(weights)]


def test_where_nothing_can_be_noted_it_says_so(said: list[str], weights: Path, tmp_path: Path) -> None:
    (tmp_path / "stores").write_text("a file where the folder should be")
    assert FileDigests(tmp_path / "stores").of([weights]) == [sha256(weights)]
    assert len(said) == 1 and "the next start reads the checkpoint again" in said[0]


def test_a_file_that_is_not_there_is_an_error(digests: FileDigests, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read the checkpoint at .*gone\.safetensors"):
        digests.of([tmp_path / "gone.safetensors"])
