"""What a peer puts on the wire, and what a process holds: for tests of both ends of a connection."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

NULL = Path(os.devnull)


def frame(message: object) -> bytes:
    """A message, or a payload that is none, as it travels."""
    payload = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
    return struct.pack("<I", len(payload)) + payload


def open_fds() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def send_with_fd(peer: socket.socket, data: bytes, count: int = 1) -> None:
    with NULL.open() as file:
        socket.send_fds(peer, [data], [file.fileno()] * count)


def wait_until(true: Callable[[], bool], what: str, seconds: float = 10) -> None:
    """For what another thread or process is about to bring about."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain until {what}"
        time.sleep(0.005)
