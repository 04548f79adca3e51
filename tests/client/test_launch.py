"""A daemon started by an engine: it outlives it, is one for all, leaves by itself, and says why it could not start."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.daemon.wire import open_fds, wait_until
from tests.runtime.record_stores import ODD, build_store
from vllm_moe_offload.client.connection import Connection, DaemonGoneError
from vllm_moe_offload.client.launch import StartError, log_path, start_daemon
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.ipc.protocol import Attach, Stop


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def end(path: Path) -> None:
    control = Connection.connect(path, "control", 10)
    control.request(Stop())
    control.close()
    wait_until(lambda: not path.exists(), "it has ended")


def test_it_serves_and_outlives_who_started_it(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    code = (
        "import sys; from pathlib import Path; from vllm_moe_offload.client.launch import start_daemon\n"
        "print(start_daemon(Path(sys.argv[1]), '1MiB', 600))"
    )
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    pid = int(result.stdout)
    assert os.getsid(pid) != os.getsid(0)
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert f"pid {pid} serves 1.0 MiB of experts" in log_path(path).read_text()
    assert start_daemon(path, "1MiB", 600) == pid
    end(path)


def test_it_is_no_descendant_and_leaves_nothing_open_here(tmp_path: Path) -> None:
    before = open_fds()
    pid = start_daemon(tmp_path / "socket", "1MiB", 600)
    assert parent_of(pid) != os.getpid()
    assert open_fds() == before
    end(tmp_path / "socket")


def test_engines_that_start_at_once_share_one(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    pids: list[int] = []
    engines = [threading.Thread(target=lambda: pids.append(start_daemon(path, "1MiB", 600))) for _ in range(3)]
    for engine in engines:
        engine.start()
    for engine in engines:
        engine.join()
    assert len(pids) == 3 and len(set(pids)) == 1
    assert log_path(path).read_text().count("serves 1.0 MiB") == 1
    end(path)
    assert "already serves" not in log_path(path).read_text()


def test_a_turn_that_never_comes_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with log_path(path).open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(StartError, match=r"another engine has tried to start a daemon for .* for 0\.2 s"):
            start_daemon(path, "1MiB", 600, timeout=0.2)


def test_it_leaves_after_the_last_engine_and_can_be_started_again(tmp_path: Path) -> None:
    stored = build_store(tmp_path / "stores", [(ODD, 4)])
    path = tmp_path / "socket"
    options = ["--store", str(tmp_path / "stores")]
    first = start_daemon(path, "1MiB", 1, options)
    engine = Connection.connect(path, "worker", 10)
    engine.request(Attach(stored.store.path.name, 1, 1 << 20, False, "g", 0))
    for fd in engine.take_fds():
        os.close(fd)
    engine.close()
    wait_until(lambda: not path.exists(), "it has left")
    assert "ending: no engine was attached for 1 s" in log_path(path).read_text()
    assert start_daemon(path, "1MiB", 600, options) != first
    end(path)


def test_one_that_was_killed_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = start_daemon(path, "1MiB", 600)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: _gone(path), "it is dead")
    assert start_daemon(path, "1MiB", 600) != first
    end(path)


def _gone(path: Path) -> bool:
    try:
        Connection.connect(path, "control", 10).close()
    except DaemonGoneError:
        return True
    return False


def test_why_it_could_not_start_is_said_with_its_last_lines(tmp_path: Path) -> None:
    before = open_fds()
    log_path(tmp_path / "socket").write_text("of an earlier one\n")
    with pytest.raises(StartError) as caught:
        start_daemon(tmp_path / "socket", "much", 600)
    assert str(caught.value).splitlines() == [
        f"the daemon that was started for {tmp_path / 'socket'} has ended:",
        "  error: --cache much: 'much' is not a size like '4GiB', '500MB' or '4096' (bytes)",
    ]
    assert open_fds() == before


def test_a_log_that_is_no_file_of_ours_is_named(tmp_path: Path) -> None:
    os.mkfifo(log_path(tmp_path / "pipe"))
    with pytest.raises(ConfigError, match=r"pipe\.log: cannot write the log of a daemon there: No such device"):
        start_daemon(tmp_path / "pipe", "1MiB", 600)
    if os.geteuid() == 0:
        log_path(tmp_path / "socket").touch()
        os.chown(log_path(tmp_path / "socket"), 65534, -1)
        with pytest.raises(ConfigError, match=r"socket\.log: is not a file of this user"):
            start_daemon(tmp_path / "socket", "1MiB", 600)


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    log_path(tmp_path / "socket").mkdir()
    with pytest.raises(ConfigError, match=r"socket\.log: cannot write the log of a daemon there: Is a directory"):
        start_daemon(tmp_path / "socket", "1MiB", 600)
