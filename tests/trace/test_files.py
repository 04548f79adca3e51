"""Histories are private, survive crashes, and keep what each of several writers adds."""

import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_trace_file import make_trace

from vllm_moe_offload.learning.temporary_folder import TemporaryFolder
from vllm_moe_offload.store.files import locked, remove_leftovers, write_atomically
from vllm_moe_offload.trace import archive as archive_module
from vllm_moe_offload.trace.archive import HistoryArchive
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.persistence import LocalHistory

SHAPE = (4, 8, 2)


def request(seed: int):
    return make_trace((5,), seed=seed)


def kept(folder: Path) -> LocalHistory:
    return LocalHistory(HistoryArchive(folder), "aa", SHAPE)


def remembered(folder: Path) -> int:
    return HistoryArchive(folder).load("aa", SHAPE)[0].num_requests


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_history_that_cannot_be_read_now_stays_and_what_comes_is_added_to_it(tmp_path: Path, said: list[str]) -> None:
    first = kept(tmp_path)
    first.history.add(request(1))
    first.close()
    before = HistoryArchive(tmp_path).path("aa").read_bytes()
    with no_descriptor_left():
        second = kept(tmp_path)
    assert second.history.num_requests == 0
    assert len(said) == 1 and "Too many open files" in said[0] and "stays as it is" in said[0]
    assert HistoryArchive(tmp_path).path("aa").read_bytes() == before
    second.history.add(request(2))
    with no_descriptor_left(), pytest.raises(OSError, match="Too many open files"):
        second.save(at_once=True)
    assert HistoryArchive(tmp_path).path("aa").read_bytes() == before
    second.close()
    assert remembered(tmp_path) == 2


@pytest.mark.parametrize("what", ["a folder", "a link to itself"])
def test_what_is_no_file_at_all_keeps_no_engine_from_starting(tmp_path: Path, said: list[str], what: str) -> None:
    path = HistoryArchive(tmp_path).path("aa")
    path.parent.mkdir(parents=True)
    if what == "a folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    assert kept(tmp_path).history.num_requests == 0
    assert len(said) == 1 and str(path) in said[0]


def test_engines_of_one_model_add_to_one_history(tmp_path: Path) -> None:
    first, second = kept(tmp_path), kept(tmp_path)
    for seed in range(30):
        first.history.add(request(seed))
    second.history.add(request(100))
    first.save(at_once=True)
    second.save(at_once=True)
    first.history.add(request(200))
    first.close()
    second.history.add(request(300))
    second.close()
    assert remembered(tmp_path) == 33


def test_engines_in_one_process_save_at_the_same_time(tmp_path: Path) -> None:
    raised: list[Exception] = []

    def engine(number: int) -> None:
        mine = kept(tmp_path)
        for seed in range(20):
            mine.history.add(request(1000 * number + seed))
            try:
                mine.save(at_once=True)
            except Exception as error:
                raised.append(error)

    engines = [threading.Thread(target=engine, args=(number,)) for number in range(3)]
    for thread in engines:
        thread.start()
    for thread in engines:
        thread.join(60)
    assert not raised and remembered(tmp_path) == 60


def test_what_is_removed_while_an_engine_runs_stays_removed(tmp_path: Path) -> None:
    running = kept(tmp_path)
    running.history.add(request(1))
    running.save(at_once=True)
    HistoryArchive(tmp_path).path("aa").unlink()
    running.history.add(request(2))
    running.close()
    assert remembered(tmp_path) == 1


def test_a_history_that_was_damaged_meanwhile_is_written_whole(tmp_path: Path) -> None:
    running = kept(tmp_path)
    for seed in range(3):
        running.history.add(request(seed))
    running.save(at_once=True)
    HistoryArchive(tmp_path).path("aa").write_bytes(b"damaged")
    running.history.add(request(4))
    running.close()
    assert remembered(tmp_path) == 4
    assert len(list(tmp_path.glob("aa/*.unusable-*"))) == 1


def test_a_writer_that_does_not_end_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "LOCK_SECONDS", 0.05)
    waiting, store = HistoryArchive(tmp_path), HistoryStore(SHAPE)
    with waiting.locked("aa"), pytest.raises(TimeoutError, match=r"history\.lock has been locked by another process"):
        waiting.save("aa", store)
    waiting.save("aa", store)


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", 1):
        (tmp_path / "lock").unlink()
        with locked(tmp_path / "lock", 1):
            assert (tmp_path / "lock").exists()


KILLED_WRITER = """
import sys
from pathlib import Path
from vllm_moe_offload.store.files import write_atomically
def write(file):
    file.write(b"x" * 100000)
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
write_atomically(Path(sys.argv[1]), write)
"""


def test_the_temporary_file_of_a_killed_writer_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    command = [sys.executable, "-c", KILLED_WRITER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
        remove_leftovers(path)
        (temporary,) = tmp_path.iterdir()
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        writer.send_signal(signal.SIGKILL)
    write_atomically(path, lambda file: file.write(b"whole"))
    assert [left.name for left in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"whole"


def test_a_start_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    path = HistoryArchive(tmp_path).path("aa")
    path.parent.mkdir(parents=True)
    for name in (f".{path.name}.abc.tmp", f"{path.name}.123.tmp"):
        path.with_name(name).write_bytes(b"half")
    kept(tmp_path)
    assert list(path.parent.iterdir()) == []


def test_nobody_else_may_read_a_history(tmp_path: Path) -> None:
    umask = os.umask(0o000)
    try:
        old = HistoryArchive(tmp_path / "new").path("aa")
        mine = kept(tmp_path / "new")
        assert HistoryArchive(tmp_path / "new").problem() is None
        mine.history.add(request(1))
        mine.close()
    finally:
        os.umask(umask)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").rglob("*")}
    assert {modes[path] for path in modes if path.is_file()} == {0o600}
    assert modes[old.parent] == 0o700 and stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    old.parent.chmod(0o755)
    kept(tmp_path / "new")
    assert stat.S_IMODE(old.parent.stat().st_mode) == 0o700, "also a folder made by an earlier version"


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_another_and_its_name_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events, fsync = tmp_path / "file", [], os.fsync
    path.write_bytes(b"old")

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        events.append((os.fstat(descriptor).st_ino, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", watched)
    write_atomically(path, lambda file: file.write(b"new"))
    assert events == [(path.stat().st_ino, b"old"), (tmp_path.stat().st_ino, b"new")]


KILLED_LEARNER = """
import sys
from vllm_moe_offload.learning.temporary_folder import TemporaryFolder
folder = TemporaryFolder("moe-offload-test-")
(folder.path / "history.npz").write_bytes(b"prompts")
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_the_temporary_folder_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command, environment = [sys.executable, "-c", KILLED_LEARNER], os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as learner:
        assert learner.stdout is not None
        theirs = Path(learner.stdout.readline().decode().strip())
        mine = TemporaryFolder("moe-offload-test-")
        assert (theirs / "history.npz").exists() and stat.S_IMODE(theirs.stat().st_mode) == 0o700
        learner.send_signal(signal.SIGKILL)
    other = TemporaryFolder("moe-offload-test-")
    assert not theirs.exists() and mine.path.exists()
    for folder in (mine, other):
        folder.cleanup()
        folder.cleanup()
    assert list(tmp_path.iterdir()) == []
