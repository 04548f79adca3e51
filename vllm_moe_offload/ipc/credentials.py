"""Who is at the other end of a Unix socket, as the kernel says. It must never trust the peer."""

import os
import socket
import struct
from typing import NamedTuple

from ..users import is_known

_UCRED = struct.Struct("iII")
_SO_PEERGROUPS = 59


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
