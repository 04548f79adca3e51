"""Who is at the other end of a Unix socket, as the kernel says. It must never believe the peer."""

import os
import socket
import struct
from pathlib import Path
from typing import Literal, NamedTuple

_UCRED = struct.Struct("iII")
_SO_PEERGROUPS = 59
_ALL_NUMBERS = 2**32 - 1
_USUALLY_FOR_ALL_OTHERS = 65534


class Peer(NamedTuple):
    """A process. ``pid`` is 0 if it lives where we cannot see it (another container)."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int]

    def is_us(self) -> bool:
        """Whether it is of the user this process runs as."""
        return self.uid == os.geteuid() and is_known(self.uid, "uid")

    def belongs_to(self, group: int) -> bool:
        return (group == self.gid or group in self.groups) and is_known(group, "gid")

    def __str__(self) -> str:
        return f"pid {self.pid} of user {self.uid}"


def is_known(number: int, kind: Literal["uid", "gid"]) -> bool:
    """Whether a number the kernel shows stands for one user or group: in a container with users of its own one number
    is shown for all that it does not have."""
    try:
        for_all_others = int(Path(f"/proc/sys/kernel/overflow{kind}").read_text())
        ranges = Path(f"/proc/self/{kind}_map").read_text().split()
    except OSError:
        return number != _USUALLY_FOR_ALL_OTHERS
    return number != for_all_others or sum(map(int, ranges[2::3])) >= _ALL_NUMBERS


def peer_of(connection: socket.socket) -> Peer:
    """Who is at the other end: who connected, or who listens at the socket this process connected to.

    Raises:
        OSError: the system does not say.
    """
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(data)
    return Peer(pid, uid, gid, _groups_of(connection))


def _groups_of(connection: socket.socket) -> frozenset[int]:
    # Python reads 1024 bytes of an option at most, hence 256 groups; who has more is known by the first one only, as is
    # everybody where the system does not know the option (Linux before 4.13, gVisor).
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    except OSError:
        return frozenset()
    return frozenset(group for (group,) in struct.iter_unpack("I", data))
