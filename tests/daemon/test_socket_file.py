"""Where the daemon is found: one at a place, dead ones replaced, nobody else's files touched, nobody else let in."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon.served_daemon import ServedDaemon
from tests.daemon.wire import open_fds
from vllm_moe_offload.client.connection import Connection, DaemonGoneError
from vllm_moe_offload.daemon.socket_file import SocketFile, find_group, lock_path
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.ipc.address import default_socket_path

NOBODY = 65534
DAEMON = (
    "import sys; sys.path.insert(0, sys.argv[2]); from served_daemon import ServedDaemon; from pathlib import Path\n"
    "served = ServedDaemon(Path(sys.argv[1])); print('serves', flush=True); input()\n"
    "served.__exit__(None, None, None)"
)
CLIENT_OF_ANOTHER_USER = (
    "import os, sys; from pathlib import Path\n"
    "from vllm_moe_offload.client.connection import Connection\n"
    "from vllm_moe_offload.errors import OffloadError\n"
    "uid, groups = int(sys.argv[2]), [int(group) for group in sys.argv[3:]]\n"
    "os.setgroups(groups); os.setgid(uid); os.setuid(uid)\n"
    "try: Connection.connect(Path(sys.argv[1]), 'worker', 10); print('welcome')\n"
    "except OffloadError as error: print(error)"
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def claim(path: Path, patience: float = 0.0) -> SocketFile:
    return SocketFile.claim(path, None, patience)


def other_daemon(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(path), str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "serves\n"
    return process


def answer_to_another_user(path: Path, uid: int, *groups: int) -> str:
    command = [sys.executable, "-c", CLIENT_OF_ANOTHER_USER, str(path), str(uid), *map(str, groups)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def test_it_is_for_this_user_only(tmp_path: Path) -> None:
    before = open_fds()
    place = claim(tmp_path / "new" / "socket")
    status = place.path.lstat()
    assert stat.S_ISSOCK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600
    assert stat.S_IMODE(place.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(lock_path(place.path).stat().st_mode) == 0o600
    place.release()
    assert not place.path.exists()
    assert open_fds() == before


def test_a_second_daemon_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with other_daemon(path) as process:
        with pytest.raises(ConfigError, match=rf"a daemon \(pid {process.pid}\) already serves there; .*daemon stop"):
            claim(path, patience=60)
        Connection.connect(path, "control", 10).close()
        process.communicate("end")
    claim(path).release()


def test_one_that_holds_the_place_without_serving_is_named_too(tmp_path: Path) -> None:
    leaving = claim(tmp_path / "socket")
    leaving.remove()
    with pytest.raises(ConfigError, match=rf"pid {os.getpid()}\) neither serves nor leaves"):
        claim(tmp_path / "socket", patience=0.1)
    leaving.release()


def test_one_that_is_leaving_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with other_daemon(path) as process:
        path.unlink()
        process.send_signal(signal.SIGTERM)
        place = claim(path, patience=60)
        assert process.wait(60) != 0, "it would not have left by itself"
        assert stat.S_ISSOCK(place.path.lstat().st_mode)
        place.release()


def test_the_socket_of_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with other_daemon(path) as process:
        process.kill()
    assert path.exists()
    with pytest.raises(DaemonGoneError, match="Connection refused"):
        Connection.connect(path, "control", 10)
    with ServedDaemon(path) as served:
        served.connect().close()
        assert served.lines[0] == f"removed {path}, which a daemon that died had left"


def test_what_is_no_socket_of_ours_stays(tmp_path: Path) -> None:
    before = open_fds()
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    link = tmp_path / "link"
    link.symlink_to(precious)
    for path in (precious, folder, link):
        with pytest.raises(ConfigError, match=f"{path}: is there already and no socket of this user"):
            claim(path)
        assert os.path.lexists(path)
    assert precious.read_text() == "mine"
    assert open_fds() == before


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_socket_another_program_listens_at_stays(tmp_path: Path, kind: socket.SocketKind) -> None:
    path = tmp_path / "bus"
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ConfigError, match="another program, no daemon of ours, listens there"):
            claim(path)
    assert path.exists()


def test_what_took_the_socket_s_place_is_not_removed(tmp_path: Path) -> None:
    place = claim(tmp_path / "socket")
    place.path.unlink()
    place.path.write_text("mine")
    place.release()
    assert place.path.read_text() == "mine"


def test_a_lock_that_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    lock_path(path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"cannot open .*socket\.lock"):
        claim(path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(("path", "reason"), [("x" * 120, "longer than the 107 bytes"), ("a/b/c", "cannot make its")])
def test_a_path_that_cannot_be_is_refused(tmp_path: Path, path: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        claim(tmp_path / path)


def test_the_default_is_in_the_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    assert default_socket_path() == tmp_path / "vllm-moe-offload.sock"


@as_root
def test_a_runtime_folder_that_is_not_ours_alone_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Path(f"/tmp/vllm-moe-offload-{os.geteuid()}/daemon.sock")
    private, shared = tmp_path / "private", tmp_path / "shared"
    private.mkdir(0o700)
    shared.mkdir()
    shared.chmod(0o1777)
    for folder in (shared, tmp_path / "missing", Path("relative"), private / "inside"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        assert default_socket_path() == elsewhere
    # as after `su`: the folder of the user before, which cannot even be looked into
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(private))
    code = "from vllm_moe_offload.ipc.address import default_socket_path as path; print(path(), path().exists())"
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said == "/tmp/vllm-moe-offload-65534/daemon.sock False\n"


@as_root
def test_without_runtime_folder_it_is_in_one_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    # A user nobody has, so that this touches no real daemon's place.
    monkeypatch.setattr(os, "geteuid", lambda: 3_999_999_999)
    folder = Path("/tmp/vllm-moe-offload-3999999999")
    assert default_socket_path() == folder / "daemon.sock"
    for owner, mode in ((0, 0o700), (3_999_999_999, 0o777), (3_999_999_999, 0o750)):
        folder.mkdir()
        try:
            os.chown(folder, owner, -1)
            folder.chmod(mode)
            with pytest.raises(ConfigError, match=f"{folder}: is not a folder of this user alone"):
                default_socket_path()
            os.chown(folder, 3_999_999_999, -1)
            folder.chmod(0o700)
            assert default_socket_path() == folder / "daemon.sock"
        finally:
            folder.rmdir()


@as_root
@pytest.mark.parametrize(("owner", "mode"), [(NOBODY, 0o755), (0, 0o775), (0, 0o757)])
def test_a_folder_others_can_write_is_no_place_for_a_socket(tmp_path: Path, owner: int, mode: int) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.chown(folder, owner, -1)
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=rf"others than this user and root can write in {folder} \(owner {owner}, d"):
        claim(folder / "socket")
    assert list(folder.iterdir()) == []


def test_a_sticky_folder_of_root_is_a_place_for_a_socket(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    place = claim(tmp_path / "socket")
    assert stat.S_ISSOCK(place.path.lstat().st_mode)
    place.release()


@as_root
def test_members_of_the_group_can_enter_the_folder_that_was_made(tmp_path: Path, said: list[str]) -> None:
    group = 4321
    open_to_all(tmp_path)
    place = SocketFile.claim(tmp_path / "made" / "socket", group, 0)
    with ServedDaemon(tmp_path / "also made" / "socket", group=group) as served:
        assert answer_to_another_user(served.path, NOBODY, group) == "welcome"
        assert "Permission denied" in answer_to_another_user(served.path, NOBODY)
    assert stat.S_IMODE(place.path.parent.stat().st_mode) == 0o710 and said == []
    place.release()
    place.path.parent.chmod(0o700)
    place = SocketFile.claim(place.path, group, 0)
    assert said == [
        f"members of group {group} cannot enter {place.path.parent}, so they will not find the daemon; "
        f"chmod o+x {place.path.parent}"
    ]
    place.release()


def open_to_all(folder: Path) -> None:
    for each in (folder, *folder.parents):
        if each.owner() == folder.owner() and each.stat().st_mode & 0o001 == 0:
            each.chmod(0o755)


def test_a_group_must_exist() -> None:
    with pytest.raises(ConfigError, match="--group nonesuch: there is no such group"):
        find_group("nonesuch")


@as_root
def test_other_users_come_in_with_the_group_only(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("shared")
    open_to_all(folder)
    group = 4321
    with ServedDaemon(folder / "socket", group=group) as served:
        status = served.path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, group)
        assert answer_to_another_user(served.path, NOBODY, group) == "welcome"
        assert "Permission denied" in answer_to_another_user(served.path, NOBODY)
        # The kernel is not all that stands between a stranger and the experts.
        served.path.chmod(0o666)
        assert f"of user {NOBODY}; the daemon serves user 0 and" in answer_to_another_user(served.path, NOBODY, 99)
        assert served.server.refused == 1
