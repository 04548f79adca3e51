"""What a peer puts on the wire, and what a process holds: for tests of both ends of a connection."""

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

NULL = Path(os.devnull)


SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
ALL_SEALS = SIZE_SEALS | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection as a daemon has them."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def connected(path: Path) -> socket.socket:
    """A connection to the daemon at ``path``."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.connect(str(path))
    return peer


def packet(message: object) -> bytes:
    """A message as it travels."""
    return msgspec.msgpack.encode(message)


def in_memfd(length: int) -> bytes:
    """What announces a message of so many bytes in a memfd."""
    return struct.pack("<BI", 0xC1, length)


def memfd(content: bytes, seals: int = ALL_SEALS) -> int:
    """A message's place; the caller closes it."""
    fd = os.memfd_create("message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def send_memfd(peer: socket.socket, fd: int, length: int, *before: int) -> None:
    """Send a message in a memfd, which is closed here, after other descriptors."""
    try:
        socket.send_fds(peer, [in_memfd(length)], [*before, fd])
    finally:
        os.close(fd)


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
