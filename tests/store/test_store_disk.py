"""Full, read-only and forbidden disks end in one clear StoreError and leave nothing behind."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_samples import LAYERS, LAYOUT, build, layer_bytes

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store import Component, RecordLayout, Store, StoreIdentity, StoreRoot, StoreWriter

Spawn = Callable[..., "subprocess.Popen[str]"]
MIB = 1 << 20
WIDE = RecordLayout((Component("w", "uint8", (65536,), 65536),))


def mount(*arguments: str) -> None:
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=1M", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder every user can enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def start(root: StoreRoot, identity: StoreIdentity) -> StoreWriter:
    writer = root.open_or_build(identity)
    assert isinstance(writer, StoreWriter)
    return writer


def test_a_disk_too_small_for_the_announced_size_is_refused_at_once(small_disk: Path, identity: StoreIdentity) -> None:
    root = StoreRoot(small_disk)
    with pytest.raises(StoreError, match=r"needs 2\.0 MiB, 10\d\d\.\d KiB are free; free space, run") as caught:
        start(root, identity).expect(2 * MIB)
    assert str(small_disk) in str(caught.value) and "VLLM_MOE_OFFLOAD_STORE_ROOT" in str(caught.value)
    assert root.ls() == []


@pytest.mark.usefixtures("silent")
def test_a_disk_that_fills_up_is_an_error_and_given_back(small_disk: Path, identity: StoreIdentity) -> None:
    root = StoreRoot(small_disk)
    writer = start(root, identity)
    with pytest.raises(StoreError, match=r"cannot build the store at .*: the disk is full \(needs .*KiB, .* free\)"):
        for index in range(4):
            writer.add_layer(f"layer {index}", WIDE, layer_bytes(index, WIDE, 8))
        writer.finish()
    assert root.ls() == []
    mount("-o", "remount,size=4M", str(small_disk))
    build(root, identity)


def test_a_disk_too_full_even_to_begin(small_disk: Path, identity: StoreIdentity) -> None:
    with pytest.raises(OSError), (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while ballast.write(bytes(4096)):
            pass
    with pytest.raises(StoreError, match=r"cannot build .* at .*: the disk is full"):
        start(StoreRoot(small_disk), identity)


def test_a_file_size_limit_is_named(root: StoreRoot, spawn: Spawn) -> None:
    limited = spawn(root.path, 3, 65536, env={**os.environ, "FILE_LIMIT": str(MIB)})
    output, _ = limited.communicate()
    assert limited.returncode == 3
    assert output.splitlines()[-1].startswith("error cannot build the store at")
    assert "ulimit -f" in output.splitlines()[-1]
    assert root.ls() == []


def test_a_writer_is_of_no_use_after_its_end(root: StoreRoot, identity: StoreIdentity) -> None:
    writer = start(root, identity)
    writer.abort()
    writer.abort()
    assert root.ls() == []
    with pytest.raises(StoreError, match="already finished or aborted"):
        writer.add_layer("layer", LAYOUT, layer_bytes(0))
    with pytest.raises(StoreError, match="already finished or aborted"):
        writer.finish()


def test_an_interrupted_progress_bar_ends_the_build(root: StoreRoot, identity: StoreIdentity) -> None:
    def interrupt(written: int) -> None:
        raise KeyboardInterrupt

    writer = start(root, identity)
    writer.progress = interrupt
    writer.add_layer(LAYERS[0], LAYOUT, layer_bytes(0))
    with pytest.raises(KeyboardInterrupt):
        writer.add_layer(LAYERS[1], LAYOUT, layer_bytes(1))
    assert root.ls() == []


def test_a_root_one_may_not_write_is_named(open_folder: Path, spawn: Spawn) -> None:
    open_folder.chmod(0o555)
    refused = spawn(open_folder / "stores", 1, 10, env={**os.environ, "UNPRIVILEGED": "1"})
    output, _ = refused.communicate()
    assert refused.returncode == 3
    assert f"cannot build a store at {open_folder}" in output and "permission denied (uid" in output
    assert "VLLM_MOE_OFFLOAD_STORE_ROOT" in output


@pytest.mark.parametrize("forbidden", ["records.bin", "manifest.json", "."])
def test_a_store_one_may_not_read_is_an_error_not_a_rebuild(open_folder: Path, spawn: Spawn, forbidden: str) -> None:
    assert spawn(open_folder, 1, 10).wait() == 0
    (info,) = StoreRoot(open_folder).ls()
    (info.path / forbidden).chmod(0)
    open_folder.chmod(0o777)
    refused = spawn(open_folder, 1, 10, env={**os.environ, "UNPRIVILEGED": "1"})
    output, _ = refused.communicate()
    assert refused.returncode == 3
    assert "cannot read the store at" in output and "permission denied (uid" in output
    assert info.path.exists()


@pytest.mark.usefixtures("silent")
def test_a_read_only_file_system_serves_but_does_not_build(tmp_path: Path, identity: StoreIdentity) -> None:
    folder = tmp_path / "stores"
    build(StoreRoot(folder), identity).close()
    mount("--bind", str(folder), str(folder))
    try:
        mount("-o", "remount,bind,ro", str(folder))
        root = StoreRoot(folder)
        store = root.open_or_build(identity)
        assert isinstance(store, Store) and store.verify() == []
        with pytest.raises(StoreError, match=r"cannot build a store at .*: the file system is read-only"):
            root.open_or_build(StoreIdentity({"other": 1}))
        with pytest.raises(StoreError, match=r"cannot set a damaged store aside .*: the file system is read-only"):
            root.set_aside(store, "damaged")
        store.close()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_file_system_without_direct_io_is_served_buffered(tmp_path: Path, identity: StoreIdentity) -> None:
    folder = tmp_path / "ram"
    folder.mkdir()
    mount("-t", "ramfs", "ramfs", str(folder))
    try:
        store = build(StoreRoot(folder), identity)
        assert not store.direct
        assert store.verify() == []
        unaligned = os.pread(store.fd, 10, store.offset(1, 2) + 3)
        assert unaligned == layer_bytes(1)[0][2][3:13].tobytes()
        store.close()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
