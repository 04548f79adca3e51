"""Whom an engine takes for its daemon: the kernel says who listens, and a place says nothing that others can write."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.daemon.scripted import ScriptedDaemon
from tests.daemon.served_daemon import ServedDaemon
from tests.daemon.test_socket_file import as_root, open_to_all
from tests.daemon.wire import open_fds
from vllm_moe_offload.client.connection import Connection, UntrustedDaemonError
from vllm_moe_offload.ipc import credentials
from vllm_moe_offload.ipc.protocol import GetStatus, Refused

OTHER = 65534


@contextmanager
def another_user() -> Iterator[None]:
    os.seteuid(OTHER)
    try:
        yield
    finally:
        os.seteuid(0)


def daemon_of_another(path: Path) -> ScriptedDaemon:
    with another_user():
        daemon = ScriptedDaemon(path, lambda request: Refused("no"))
    path.chmod(0o666)
    return daemon


@as_root
@pytest.mark.parametrize("role", ["worker", "history", "control"])
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_nothing_is_said_to_whoever_listens_where_others_can_write(tmp_path: Path, role: str, mode: int) -> None:
    open_to_all(tmp_path)
    tmp_path.chmod(mode)
    before = open_fds()
    said = rf"is not trusted: it runs as user {OTHER}\. User 0 uses"
    with daemon_of_another(tmp_path / "socket") as impostor, pytest.raises(UntrustedDaemonError, match=said):
        Connection.connect(tmp_path / "socket", role, 10)
    assert impostor.roles == []
    assert open_fds() == before


@as_root
def test_another_user_s_daemon_is_used_where_root_has_made_its_folder(tmp_path: Path) -> None:
    open_to_all(tmp_path)
    folder = tmp_path / "service"
    folder.mkdir()
    os.chown(folder, OTHER, -1)
    with daemon_of_another(folder / "socket"), closing(Connection.connect(folder / "socket", "control", 10)) as control:
        assert control.peer.uid == OTHER


@as_root
@pytest.mark.parametrize(("mode_above", "mode"), [(0o755, 0o775), (0o755, 0o1777), (0o777, 0o755), (0o1777, 0o755)])
def test_it_is_not_where_it_may_have_made_the_folder_itself(tmp_path: Path, mode_above: int, mode: int) -> None:
    open_to_all(tmp_path)
    folder = tmp_path / "service"
    folder.mkdir()
    os.chown(folder, OTHER, -1)
    folder.chmod(mode)
    tmp_path.chmod(mode_above)
    with daemon_of_another(folder / "socket"), pytest.raises(UntrustedDaemonError):
        Connection.connect(folder / "socket", "control", 10)


CLIENT = """
import sys; from pathlib import Path
from vllm_moe_offload.client.connection import Connection
from vllm_moe_offload.errors import OffloadError
for path in sys.argv[1:]:
    try: print(Connection.connect(Path(path), "control", 10).peer.uid)
    except OffloadError as error: print(error)
"""


@as_root
@pytest.mark.skipif(
    subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode != 0,
    reason="this machine lets nobody make user namespaces",
)
def test_in_a_container_with_users_of_its_own_nobody_passes_for_somebody(tmp_path: Path) -> None:
    """Whoever it does not know is shown as one and the same user."""
    open_to_all(tmp_path)
    folder = tmp_path / "service"
    folder.mkdir()
    os.chown(folder, OTHER - 1, -1)
    os.seteuid(OTHER - 1)
    try:
        daemon = ScriptedDaemon(folder / "socket", lambda request: Refused("no"))
    finally:
        os.seteuid(0)
    with daemon, ServedDaemon(tmp_path / "ours") as served:
        (folder / "socket").chmod(0o666)
        command = ["unshare", "-Ur", sys.executable, "-c", CLIENT, str(folder / "socket"), str(served.path)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert said[0].endswith("it runs as a user who does not exist in this container (seen as 65534)")
    assert said[1] == "0", "its own user's daemon outside of it is known"


def test_a_kernel_that_does_not_tell_groups_ends_no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_SO_PEERGROUPS", 9999)
    with ServedDaemon(tmp_path / "socket") as served, closing(served.connect("control")) as control:
        assert control.peer.groups == frozenset()
        assert control.request(GetStatus()).pid == os.getpid()


def test_a_kernel_that_does_not_tell_who_comes_ends_no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ServedDaemon(tmp_path / "socket") as served:
        with monkeypatch.context() as broken:
            broken.setattr(credentials.socket, "SO_PEERCRED", 9999)
            with pytest.raises(UntrustedDaemonError, match="the system does not say who the daemon"):
                served.connect("control")
        with closing(served.connect("control")) as control:
            assert control.request(GetStatus()).pid == os.getpid()
