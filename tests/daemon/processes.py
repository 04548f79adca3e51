"""Daemons in processes of their own, as a user would run them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllm_moe_offload.client.connection import Connection, DaemonGoneError
from vllm_moe_offload.ipc.protocol import GetStatus, StatusReport

ANSWER_SECONDS = 60.0
COMMAND = (sys.executable, "-m", "vllm_moe_offload")


class DaemonProcess:
    """A daemon that serves. Its log lies beside its socket.

    Args:
        cache: bytes of experts.
        store: root of the stores.
        command: what ``daemon …`` is given to.
    """

    def __init__(self, socket: Path, cache: int, store: Path, *options: str, command: Sequence[str] = COMMAND):
        self.socket = socket
        command = [*command, "daemon", "--socket", str(socket), "--cache", f"{cache}B"]
        command += ["--store", str(store), "--history", "off", *options]
        with self.log_path.open("ab") as log:
            environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                self.status()
            except DaemonGoneError:
                assert self._process.poll() is None, self.log_path.read_text()
                assert time.monotonic() < deadline, "the daemon does not answer"
                time.sleep(0.02)
            else:
                return

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log_path(self) -> Path:
        return self.socket.with_suffix(".log")

    def status(self) -> StatusReport:
        connection = Connection.connect(self.socket, "control", ANSWER_SECONDS)
        try:
            return connection.request(GetStatus())
        finally:
            connection.close()

    def kill(self) -> None:
        """As the kernel would, short of memory."""
        self._process.kill()
        self._process.wait()

    def suspend(self) -> None:
        """As a debugger would: none of its threads runs any more when this returns. SIGCONT lets it go on."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def terminate(self) -> None:
        """Tell it to end."""
        self._process.terminate()

    def stop(self) -> None:
        """As systemd would; it must end well."""
        self.terminate()
        self.wait()

    def wait(self) -> None:
        """For its end; it must end well."""
        try:
            status = self._process.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)
            status = self._process.wait()
        assert status == 0, self.log_path.read_text()

    def abandon(self) -> None:
        """After a failure."""
        if self._process.poll() is None:
            self.kill()


@contextmanager
def running_daemon(socket: Path, cache: int, store: Path, *options: str) -> Iterator[DaemonProcess]:
    """A daemon, ended whatever happens."""
    daemon = DaemonProcess(socket, cache, store, *options)
    try:
        yield daemon
        daemon.stop()
    finally:
        daemon.abandon()
