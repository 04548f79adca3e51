"""The command: a daemon in the foreground with a real store, seen, counted and ended from outside."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.runtime.record_stores import ODD, RecordStore, build_store
from vllm_moe_offload.client.connection import Connection, DaemonGoneError
from vllm_moe_offload.daemon.socket_file import lock_path
from vllm_moe_offload.ipc.protocol import Attach, Demand, StatusReport, pack_ids

COMMAND = [sys.executable, "-m", "vllm_moe_offload", "daemon"]
LAYERS, EXPERTS = 3, 8
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> RecordStore:
    return build_store(tmp_path_factory.mktemp("stores"), [(ODD, EXPERTS)] * LAYERS)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)


@contextmanager
def daemon(folder: Path, store: RecordStore, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon at ``folder/socket`` that has told its service manager that it is ready."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(folder / "notify"))
        manager.settimeout(60)
        command = [*COMMAND, "--socket", str(folder / "socket"), "--store", str(store.store.path.parent)]
        process = subprocess.Popen(
            [*command, "--cache", "1MiB", *options],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NOTIFY_SOCKET": str(folder / "notify")},
        )
        try:
            assert manager.recv(100) == b"READY=1"
            yield process
            process.terminate()
            assert process.wait(30) == 0
            assert manager.recv(100) == b"STOPPING=1"
        finally:
            process.kill()
            process.communicate()
            (folder / "notify").unlink()


@contextmanager
def worker(folder: Path, store: RecordStore) -> Iterator[Connection]:
    connection = Connection.connect(folder / "socket", "worker", 30)
    try:
        attached = connection.request(Attach(store.store.path.name, 1, 1 << 20, False, "engine", 0))
        assert [pool.experts for pool in attached.pools] == [LAYERS * EXPERTS]
        for fd in connection.take_fds():
            os.close(fd)
        yield connection
    finally:
        connection.close()


def test_a_model_is_served_seen_and_counted(tmp_path: Path, stored: RecordStore) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with daemon(tmp_path, stored, "--metrics-port", str(port)), worker(tmp_path, stored) as engine:
        supplied = engine.request(Demand(1, 0, pack_ids(np.array([2, 9, 23]))))
        assert (supplied.loaded, supplied.failed) == (3, [])
        text = run("status", "--socket", str(tmp_path / "socket"), "--json").stdout
        report = msgspec.json.decode(text, type=StatusReport)
        (model,) = report.models
        assert model.store == stored.store.path.name
        assert (model.stats["experts"], model.stats["resident_experts"]) == (LAYERS * EXPERTS, 3)
        assert [each.pid for each in model.workers] == [os.getpid()]
        assert report.budget_bytes == json.loads(text)["budget_bytes"] == 1 << 20

        shown = run("status", "--socket", str(tmp_path / "socket")).stdout
        assert f"pid {report.pid}, up " in shown and model.store[:12] in shown and str(os.getpid()) in shown

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        labels = f'{{model="{model.model}",store="{model.store}"}}'
        assert f"vllm_moe_offload_daemon_attached_workers{labels} 1.0" in metrics
        assert f"vllm_moe_offload_daemon_resident_bytes{labels} {float(model.stats['resident_bytes'])}" in metrics
        assert f"vllm_moe_offload_daemon_loads_total{labels} 3.0" in metrics
        assert "vllm_moe_offload_daemon_budget_bytes 1.048576e+06" in metrics

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/moe-offload", timeout=10) as answer:
            assert answer.read().startswith(b"<!doctype html>")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/moe-offload/data", timeout=10) as answer:
            page = json.load(answer)
        assert page["models"] == [model.model]


def test_top_follows_until_interrupted(tmp_path: Path, stored: RecordStore) -> None:
    with daemon(tmp_path, stored), worker(tmp_path, stored) as engine:
        screen, terminal = os.openpty()
        command = [*COMMAND, "top", "--socket", str(tmp_path / "socket"), "--interval", "0.1"]
        wide = os.environ | {"COLUMNS": "200", "TERM": "xterm"}
        with subprocess.Popen(
            command, stdout=terminal, stderr=subprocess.PIPE, text=True, env=wide, preexec_fn=_heed_interrupts
        ) as process:
            try:
                _read_until(screen, stored.store.path.name[:12])
                engine.request(Demand(1, 0, pack_ids(np.array([2, 9, 23]))))
                _read_until(screen, " 3 (")
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=30)
            finally:
                process.kill()
        os.close(terminal)
        os.close(screen)
    assert (process.returncode, err) == (0, "")


def _heed_interrupts() -> None:
    """As on a terminal; what a shell starts in the background ignores them, tests included."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _read_until(screen: int, text: str) -> None:
    shown = ""
    while text not in shown:
        ready, _, _ = select.select([screen], [], [], 60)
        assert ready, f"{text!r} did not appear in {shown!r}"
        shown += os.read(screen, 65536).decode()


def test_stop_waits_for_its_end(tmp_path: Path, stored: RecordStore) -> None:
    with ExitStack() as stack:
        process = stack.enter_context(daemon(tmp_path, stored))
        engine = stack.enter_context(worker(tmp_path, stored))
        result = run("stop", "--socket", str(tmp_path / "socket"))
        assert (result.returncode, result.stdout) == (0, f"the daemon (pid {process.pid}) has ended\n")
        assert process.wait(0.5) == 0
        assert process.stderr is not None
        assert process.stderr.read().rstrip().endswith(f"of user {os.geteuid()} asked for it")
        with pytest.raises(DaemonGoneError):
            engine.request(Demand(1, 0, b""))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["socket.lock"]


def test_it_leaves_when_engines_have_left(tmp_path: Path, stored: RecordStore) -> None:
    with daemon(tmp_path, stored, "--leave-after", "0.2") as process:
        with worker(tmp_path, stored):
            pass
        assert process.wait(30) == 0


def test_a_second_daemon_is_told_of_the_first(tmp_path: Path, stored: RecordStore) -> None:
    with daemon(tmp_path, stored) as process:
        second = run("--socket", str(tmp_path / "socket"), "--cache", "1MiB")
        assert second.returncode == 2
        assert f"a daemon (pid {process.pid}) already serves there" in second.stderr
        assert len(second.stderr.splitlines()) == 1
        Connection.connect(tmp_path / "socket", "control", 10).close()


def test_a_metrics_port_in_use_is_named_and_the_place_given_up(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = run("--socket", str(tmp_path / "socket"), "--cache", "1MiB", "--metrics-port", str(port))
    assert result.returncode == 2
    assert f"--metrics-port {port}: cannot listen at 127.0.0.1:{port}: Address already in use" in result.stderr
    assert not (tmp_path / "socket").exists()


REFUSED = {
    "no size": ([], "--cache is missing: give a size like '4GiB'"),
    "a share": (["--cache", "25%"], "--cache 25%: '25%' is not a size like '4GiB'"),
    "auto": (["--cache", "auto"], "--cache auto: 'auto' is not a size"),
    "policy": (["--cache", "1GiB", "--policy", "fifo"], "policy: 'fifo' is unknown; choose one of lfu, lru, "),
    "share": (["--cache", "1GiB", "--share", "abc"], "--share abc: give STORE=SIZE"),
    "size of a share": (["--cache", "1GiB", "--share", "abc=much"], "--share abc= much: 'much' is not a size"),
    "group": (["--cache", "1GiB", "--socket", "x", "--group", "nonesuch"], "--group nonesuch: there is no such group"),
    "group alone": (["--cache", "1GiB", "--group", "root"], "--group root: name a --socket"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    options, reason = REFUSED[case]
    result = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {reason}")
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_its_operator_may_name_an_eviction_policy_from_outside(
    tmp_path: Path, stored: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = run("--cache", "1MiB", "--socket", str(tmp_path / "socket"), "--policy", "lru_2:Missing")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: policy = 'lru_2:Missing' cannot be imported (")
    monkeypatch.setenv("PYTHONPATH", f"{EXAMPLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    chosen = ("--policy", "lru_2:LeastRecentlyUsedTwice")
    with daemon(tmp_path, stored, *chosen), worker(tmp_path, stored) as engine:
        assert engine.request(Demand(1, 0, pack_ids(np.array([1, 9])))).loaded == 2


@pytest.mark.parametrize("command", ["status", "top", "stop"])
def test_without_a_daemon_there_is_nothing_to_see(command: str, tmp_path: Path) -> None:
    result = run(command, "--socket", str(tmp_path / "socket"))
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: no daemon answers at {tmp_path / 'socket'} (No such file or directory)")


def test_a_killed_daemon_is_followed_by_the_next(tmp_path: Path, stored: RecordStore) -> None:
    with pytest.raises(AssertionError), daemon(tmp_path, stored) as process:
        process.kill()
        process.wait()
    assert lock_path(tmp_path / "socket").exists() and (tmp_path / "socket").exists()
    with daemon(tmp_path, stored), worker(tmp_path, stored) as engine:
        assert engine.request(Demand(1, 0, pack_ids(np.array([1])))).loaded == 1
