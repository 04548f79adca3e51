"""`doctor` looks at the daemon that runs at the usual place, and shows threads it has lost."""

import socket
import threading
from pathlib import Path

import pytest

from tests.daemon.served_daemon import ServedDaemon
from vllm_moe_offload import threads
from vllm_moe_offload.cli.check import OK, WARNING
from vllm_moe_offload.cli.daemon_check import check_daemon
from vllm_moe_offload.cli.daemon_view import status_view
from vllm_moe_offload.threads import ReportedThread


def test_a_daemon_that_has_lost_a_thread_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(threading, "excepthook", lambda fault: None)
    monkeypatch.setattr(threads, "_failed", [])
    tmp_path.chmod(0o700)
    assert check_daemon().state == OK, "there is none"
    with ServedDaemon(tmp_path / "vllm-moe-offload.sock") as served:
        sound = check_daemon()
        assert sound.state == OK and "answers at" in sound.detail

        def work() -> None:
            raise OSError("the disk has gone")

        keeper = ReportedThread(target=work, name="moe-offload-keeper")
        keeper.start()
        keeper.join(30)
        found = check_daemon()
        assert found.state == WARNING and "moe-offload-keeper: OSError: the disk has gone" in found.detail
        report = served.server.status()
        assert report.failed_threads == ["moe-offload-keeper: OSError: the disk has gone"]
        assert "a thread has ended by an error: moe-offload-keeper" in str(status_view(report).renderables)
    (tmp_path / "vllm-moe-offload.sock").write_text("in the way")
    found = check_daemon()
    assert found.state == WARNING


def test_a_daemon_of_another_release_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as older:
        older.bind(str(tmp_path / "vllm-moe-offload.sock"))
        older.listen()
        found = check_daemon()
    assert found.state == WARNING and "is of another release of vllm-moe-offload" in found.detail
