"""Which daemon an engine uses: with ``auto`` it starts whatever is wrong, else it says what is wrong and what helps."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.scripted import ScriptedDaemon
from tests.daemon.serving import serving
from tests.daemon.wire import open_fds, packet, wait_until
from tests.log_lines import LogLines
from tests.runtime.record_stores import ODD, RecordStore, build_store
from vllm_moe_offload.client import attachment, connection
from vllm_moe_offload.client.client import DaemonClient
from vllm_moe_offload.client.connection import Connection
from vllm_moe_offload.client.joining import join_daemon, socket_of
from vllm_moe_offload.daemon.socket_file import SocketFile
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.ipc import address, membarrier
from vllm_moe_offload.ipc.protocol import (
    VERSION,
    Attach,
    GetStatus,
    ModelStatus,
    Refused,
    Request,
    StatusReport,
    Stop,
    Welcome,
)
from vllm_moe_offload.stats import Stats


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> RecordStore:
    return build_store(tmp_path_factory.mktemp("stores"), [(ODD, 8)] * 2)


class Engine:
    """Starts with a setting, as ``integration/placement.py`` does."""

    def __init__(self, stored: RecordStore, lines: list[str]):
        self.stored = stored
        self.lines = lines

    def start(self, setting: str, policy: str = "lfu") -> DaemonClient | None:
        store = self.stored.store
        request = Attach(store.path.name, os.getpid(), 1 << 16, False, "g", 0, [2])
        return join_daemon(setting, request, store, policy, 1 << 20, None, Stats())

    def start_alone(self, path: Path) -> str:
        """With ``auto`` it starts and returns the line that says why alone. With ``unix:`` it says so and ends."""
        before = open_fds()
        assert self.start("auto") is None
        (line,) = self.lines
        assert line.startswith("no daemon can be used: ") and "this engine keeps its own experts" in line
        with pytest.raises(ConfigError, match=r"^daemon = 'unix:.*; or choose 'auto' or 'off'$"):
            self.start(f"unix:{path}")
        wait_until(lambda: open_fds() <= before, "nothing is left of the attempts")
        return line


@pytest.fixture
def engine(stored: RecordStore) -> Iterator[Engine]:
    log = LogLines(within="joining")
    yield Engine(stored, log.attach())
    log.detach()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``auto`` looks."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "vllm-moe-offload.sock"


def test_auto_uses_the_daemon_that_runs_and_none_where_none_does(path: Path, engine: Engine) -> None:
    assert engine.start("auto") is None and engine.start("off") is None
    with serving(path, engine.stored.store.path.parent) as models:
        client = engine.start("auto")
        assert client is not None and client.path == path
        assert len(models.status()[0].workers) == 1
        assert engine.start("off") is None
        client.close()
    assert engine.lines == []


def test_a_socket_is_named_with_and_without_unix(path: Path, engine: Engine, tmp_path: Path) -> None:
    other = tmp_path / "other.sock"
    with serving(other, engine.stored.store.path.parent):
        for setting in (f"unix:{other}", str(other)):
            client = engine.start(setting)
            assert client is not None and client.path == socket_of(setting) == other
            client.close()
    with pytest.raises(ConfigError, match=f"no daemon answers at {other}"):
        engine.start(str(other))


def test_without_membarrier_nobody_is_attached(path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(path, engine.stored.store.path.parent) as models:
        monkeypatch.setattr(membarrier, "_SYSCALL", dict.fromkeys(membarrier._SYSCALL, 100_000))
        assert "membarrier(2)" in engine.start_alone(path)
        monkeypatch.undo()
        assert not any(model.workers for model in models.status())


def test_memory_that_cannot_be_mapped_detaches(path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(fd: int, *_: object) -> None:
        os.close(fd)
        raise MemoryError

    monkeypatch.setattr("vllm_moe_offload.client.client.Arena.attach", no_room)
    with serving(path, engine.stored.store.path.parent) as models:

        def start() -> int:
            assert engine.start("auto") is None
            wait_until(lambda: not models.status()[0].workers, "the daemon has detached it")
            return len(open_fds())

        opened = start()
        assert "MemoryError" in engine.lines[0]
        wait_until(lambda: start() <= opened, "nothing is left of an attempt")


def test_a_daemon_that_falls_silent_after_hello_is_not_waited_for(
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(attachment, "STATUS_SECONDS", 0.2)
    with ScriptedDaemon(path, lambda request: None) as daemon:
        assert f"the daemon at {path} sent nothing for 0.2 s" in engine.start_alone(path)
        assert daemon.roles[:2] == ["worker", "control"]


def test_a_long_attachment_is_waited_for_while_the_daemon_reads(
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads for longer than a daemon may read nothing, and then stops reading."""
    monkeypatch.setattr(connection, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(attachment, "STALLED_SECONDS", 0.3)
    loads = iter(range(1, 20))

    def answer(request: Request) -> StatusReport | None:
        stats: dict[str, int | float] = {"loads": next(loads, 20)}
        model = ModelStatus(engine.stored.store.path.name, "", stats, [])
        return StatusReport(1, 0, 0, [model], []) if isinstance(request, GetStatus) else None

    with ScriptedDaemon(path, answer) as daemon:
        assert "has read nothing for 0.3 s and does not attach this engine" in engine.start_alone(path)
        assert daemon.roles.count("control") > 20


def test_a_daemon_that_refuses_is_named_with_its_reason(path: Path, engine: Engine) -> None:
    with ScriptedDaemon(path, lambda request: Refused("there is no room for 7 GiB")):
        assert "refuses: there is no room for 7 GiB" in engine.start_alone(path)


def test_a_socket_nobody_listens_at_is_said(path: Path, engine: Engine) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(path))
    assert "Connection refused" in engine.start_alone(path)


def test_a_default_place_somebody_else_has_made_is_said(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def squatted(folder: Path) -> None:
        raise ConfigError(f"{folder}: is not a folder of this user alone")

    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os.path, "lexists", lambda path: True)
    monkeypatch.setattr(address, "_check_private", squatted)
    assert engine.start("auto") is None
    assert "is not a folder of this user alone" in engine.lines[0]
    with pytest.raises(ConfigError, match=r"daemon = 'start': .*is not a folder of this user alone"):
        engine.start("start")


def test_a_daemon_that_answers_and_leaves_is_followed_by_one_that_is_started(path: Path, engine: Engine) -> None:
    leaving = SocketFile.claim(path, None)

    def leave_after_one_answer() -> None:
        peer, _ = leaving.listener.accept()
        with peer:
            peer.recv(100)
            peer.send(packet(Welcome(VERSION, os.getpid())))
            leaving.release()

    thread = threading.Thread(target=leave_after_one_answer)
    thread.start()
    client = engine.start("start")
    thread.join()
    assert client is not None and client.daemon_pid != os.getpid()
    client.close()
    control = Connection.connect(path, "control", 10)
    control.request(Stop())
    control.close()
    wait_until(lambda: not path.exists(), "it has ended")


def test_a_daemon_that_is_started_gets_the_engines_eviction_policy(path: Path, engine: Engine) -> None:
    with pytest.raises(ConfigError, match=r"(?s)daemon = 'start': .*policy = 'no\.such:Policy' cannot be imported"):
        engine.start("start", policy="no.such:Policy")
    assert not path.exists()
