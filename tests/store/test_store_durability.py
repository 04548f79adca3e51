"""What holds when the power fails or a process dies between two system calls: order is all there is."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from store_samples import build

from vllm_moe_offload.store import StoreIdentity, StoreRoot
from vllm_moe_offload.store.lock import BuildLock

DIE_WHILE_PRUNING = """
import os, shutil, signal, sys
from pathlib import Path
from vllm_moe_offload.store import StoreRoot
root = StoreRoot(Path(sys.argv[1]))
def die_half_way(path):
    (Path(path) / "manifest.json").unlink()
    os.kill(os.getpid(), signal.SIGKILL)
shutil.rmtree = die_half_way
root.prune(root.prunable(everything=True))
"""


def test_everything_is_on_disk_before_a_store_is_in_its_place(
    root: StoreRoot, identity: StoreIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def seen_fsync(fd: int) -> None:
        fsync(fd)
        order.append(f"fsync {Path(f'/proc/self/fd/{fd}').readlink().name.split('.building')[0]}")

    def seen_rename(path: Path, target: Any) -> Path:
        order.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "rename", seen_rename)
    build(root, identity).close()
    before, after = order[: order.index("rename")], order[order.index("rename") + 1 :]
    assert set(before) == {"fsync records.bin", "fsync manifest.json", f"fsync {identity.fingerprint}"}
    assert before[-1] == f"fsync {identity.fingerprint}"
    assert after == [f"fsync {root.path.name}"]


@pytest.mark.usefixtures("silent")
def test_a_removal_killed_half_way_leaves_nothing_at_the_stores_place(root: StoreRoot, identity: StoreIdentity) -> None:
    path = build(root, identity).path
    killed = subprocess.run([sys.executable, "-c", DIE_WHILE_PRUNING, str(root.path)])
    assert killed.returncode < 0
    assert not path.exists()
    assert [info.state for info in root.ls()] == ["leftover"]
    build(root, identity).close()
    assert [info.state for info in root.ls()] == ["complete"]


def test_a_lock_whose_file_was_removed_before_it_was_locked_excludes_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock, removed = tmp_path / "lock", fcntl.flock, []

    def pruned_meanwhile(fd: int, operation: int) -> None:
        if not removed:
            removed.append(path.unlink())
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", pruned_meanwhile)
    lock = BuildLock.try_acquire(path)
    assert removed and lock is not None
    assert BuildLock.try_acquire(path) is None and BuildLock.held(path)
    lock.release()
    assert not BuildLock.held(path)
