"""Whole messages over a Unix socket: limits, deadlines, descriptors. It must never know what they mean.

The socket keeps boundaries (``SOCK_SEQPACKET``): a packet arrives with all its bytes and descriptors or not at all. A
packet is one msgpack message. One that is too long for that lies in a sealed memfd, whose descriptor is the packet's
last; the packet then is ``0xC1``, with which no msgpack message begins, and the length. A sealed memfd has its bytes
for ever, and nobody can change them while they are read. Its memory is the sender's, who waits until it is read.
"""

import errno
import fcntl
import os
import select
import socket
import struct
import sys
import termios
import threading
import time
from array import array
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from ..errors import OffloadError
from .protocol import MESSAGE_BYTES, Message
from .shm import NAME_PREFIX, SIZE_SEALS, PeerMemoryError, check_descriptor

PEER_SECONDS = 10.0
"""How long a peer is waited for until it reads what it was sent, or says Hello; and how long it waits for its turn with
a large message."""
LARGE_MESSAGES = 4
"""Handled at a time by one process that bounds them; see ``Channel.large``."""
PACKET_BYTES = 1 << 16
"""Longer messages travel in a memfd. The system would carry packets of some 200 KiB, if nobody has lowered its limit
(``net.core.wmem_default``)."""

_IN_MEMFD = struct.Struct("<BI")
_MARK = 0xC1
_CONTENT_SEALS = SIZE_SEALS | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_CREDENTIALS_BYTES = socket.CMSG_SPACE(struct.calcsize("iII"))
_NAP_MILLISECONDS = 1
_TIMEVAL = struct.Struct("@ll")

M = TypeVar("M")


class PeerError(OffloadError):
    """The other side broke the protocol; nothing it sends can be understood any more."""


class SilentPeerError(PeerError):
    """The other side sent nothing for as long as it was waited for, or did not read what it was sent."""


class Channel(Generic[M]):
    """Sends and receives messages over a connected socket, which it owns.

    One thread may send while another receives; no more than that.

    Args:
        peer: a connected socket of the kind ``SOCK_SEQPACKET``.
        decoder: of the messages that may come in.
        max_fds: descriptors the other side may send with a message.
    """

    def __init__(self, peer: socket.socket, decoder: "msgspec.msgpack.Decoder[M]", max_fds: int) -> None:
        peer.setblocking(True)
        # Every packet then comes with its sender's credentials, and the end of the connection, which otherwise looks
        # like a packet without bytes, with nothing.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.limit = MESSAGE_BYTES
        """Bytes that a message may have, in either direction."""
        self.large: threading.Semaphore | None = None
        """Who receives or answers more than ``MESSAGE_BYTES`` holds it until the next ``receive``: it bounds the memory
        that connections which share it take together."""
        self._holds_large = False
        self._fds: list[int] = []
        self._peer = peer
        self._decoder = decoder
        self._max_fds = max_fds
        self._ancillary_bytes = _CREDENTIALS_BYTES + socket.CMSG_LEN((max_fds + 1) * 4)
        self._packet_bytes = min(PACKET_BYTES, peer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2)
        self._encode_into = msgspec.msgpack.Encoder().encode_into
        self._outgoing = bytearray()
        self._incoming = memoryview(bytearray(PACKET_BYTES))
        self._buffers: list[Any] = [self._incoming]
        self._patience = 0.0
        self._timeout(socket.SO_SNDTIMEO, PEER_SECONDS)

    def wait_at_most(self, seconds: float) -> None:
        """How long ``receive`` waits for a message; 0 is for ever."""
        if seconds != self._patience:
            self._timeout(socket.SO_RCVTIMEO, seconds)
            self._patience = seconds

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message, with descriptors (they stay open here).

        Raises:
            ValueError: the message is larger than ``limit``; nothing was sent.
            SilentPeerError: the other side has too much to read already, and did not read it in time.
            OSError: there is no other side any more, or the system has no memory for the message.
        """
        encoded = self._outgoing
        try:
            self._encode_into(message, encoded)
            if len(encoded) > self.limit:
                raise ValueError(f"{type(message).__name__} of {len(encoded)} bytes; at most {self.limit} can be sent")
            if len(encoded) <= self._packet_bytes:
                self._send_packet(encoded, fds)
            else:
                self._send_in_memfd(encoded, fds)
        finally:
            if len(encoded) > self._packet_bytes:
                self._outgoing = bytearray()

    def receive(self) -> M | None:
        """The next message; None if the other side closed the connection after its last one.

        Raises:
            PeerError: what came is too long, cut short, no message, in memory that may change, or brought descriptors
                unasked. None of its descriptors is open any more.
            SilentPeerError: nothing came in the time set by ``wait_at_most``.
        """
        self._release_large()
        try:
            if self._fds:
                raise PeerError("sent descriptors that nobody asked for")
            encoded = self._receive_packet()
            if encoded is None:
                return None
            if encoded[0] == _MARK:
                return self._decode(self._received_in_memfd(encoded))
            if len(self._fds) > self._max_fds:
                raise PeerError(f"sent too many descriptors; at most {self._max_fds} are accepted")
            return self._decode(encoded)
        except PeerError:
            self._close_fds()
            raise

    def comes_within(self, seconds: float) -> bool:
        """Whether ``receive`` has something to look at before so much time is over: a message, or the end of the
        connection."""
        readable = select.poll()
        readable.register(self._peer, select.POLLIN)
        return bool(readable.poll(seconds * 1000))

    def take_fds(self) -> list[int]:
        """The descriptors that came with the message received last; they are the caller's now."""
        taken, self._fds = self._fds, []
        return taken

    def hold_large(self, seconds: float) -> None:
        """Wait until few enough large messages are being handled to handle one more. Idempotent until ``receive``.

        Raises:
            PeerError: that does not happen in time.
        """
        if self.large is not None and not self._holds_large:
            if not self.large.acquire(timeout=max(0.0, seconds)):
                raise PeerError("came with a large message while others were being handled; it may try again")
            self._holds_large = True

    def shut_down(self) -> None:
        """End the connection; a thread that waits in ``receive`` sees it. From any thread."""
        try:
            self._peer.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        self._release_large()
        self._close_fds()
        self._peer.close()

    def _send_packet(self, packet: bytes | bytearray, fds: Sequence[int]) -> None:
        try:
            if fds:
                socket.send_fds(self._peer, [packet], fds)
            else:
                self._peer.send(packet)
        except BlockingIOError:
            raise SilentPeerError(f"did not read a message for {PEER_SECONDS:g} s") from None

    def _send_in_memfd(self, encoded: bytearray, fds: Sequence[int]) -> None:
        fd = _sealed(encoded)
        try:
            self._send_packet(_IN_MEMFD.pack(_MARK, len(encoded)), [*fds, fd])
        finally:
            os.close(fd)
        self._wait_until_read()

    def _wait_until_read(self) -> None:
        """Until the other side has received all packets, or the connection has ended."""
        deadline = time.monotonic() + PEER_SECONDS
        hung_up = select.poll()
        hung_up.register(self._peer, 0)
        while self._unread_bytes() and not hung_up.poll(_NAP_MILLISECONDS):
            if time.monotonic() > deadline:
                raise SilentPeerError(f"did not read a message for {PEER_SECONDS:g} s")

    def _unread_bytes(self) -> int:
        return int.from_bytes(fcntl.ioctl(self._peer, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def _receive_packet(self) -> memoryview | None:
        """The next packet, which is not empty; None at the end of the connection. Its descriptors go to ``_fds``."""
        try:
            count, ancillary, flags = self._receive_once()
        except BlockingIOError:
            raise SilentPeerError(f"sent nothing for {self._patience:g} s") from None
        if not ancillary:
            return None
        if len(ancillary) > 1:
            self._fds = _descriptors_in(ancillary)
        if flags & socket.MSG_CTRUNC:
            raise PeerError(
                f"sent too many descriptors; at most {self._max_fds} are accepted"
                if len(self._fds) > self._max_fds
                else "sent descriptors, and this process may not open so many files"
            )
        if flags & socket.MSG_TRUNC:
            raise PeerError(f"sent a packet of more than {PACKET_BYTES} bytes")
        if not count:
            raise PeerError("sent an empty packet")
        return self._incoming[:count]

    def _receive_once(self) -> tuple[int, list[tuple[int, int, bytes]], int]:
        for last in (False, True):
            try:
                return self._peer.recvmsg_into(self._buffers, self._ancillary_bytes, socket.MSG_CMSG_CLOEXEC)[:3]
            except ConnectionResetError:
                # Said once, before what the other side sent, when it has left without reading everything.
                if last:
                    break
        return 0, [], 0

    def _received_in_memfd(self, packet: memoryview) -> bytearray:
        """The message whose place ``packet`` tells."""
        if len(packet) != _IN_MEMFD.size:
            raise PeerError("sent no message that is known here: not one in a memfd either")
        _, length = _IN_MEMFD.unpack(packet)
        if length > self.limit:
            raise PeerError(f"announced a message of {length} bytes; at most {self.limit} are accepted")
        if not self._fds:
            raise PeerError("announced a message in a memfd and did not send it")
        fd = self._fds.pop()
        try:
            check_descriptor(fd, length, _CONTENT_SEALS)
            if length > MESSAGE_BYTES:
                self.hold_large(PEER_SECONDS)
            return _read(fd, length)
        except PeerMemoryError as error:
            raise PeerError(f"sent a message in memory that cannot be trusted: {error}") from None
        except OSError as error:
            raise PeerError(f"sent a message in memory that cannot be read: {error.strerror}") from None
        finally:
            os.close(fd)

    def _decode(self, encoded: memoryview | bytearray) -> M:
        try:
            return self._decoder.decode(encoded)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise PeerError(f"sent no message that is known here: {error}") from None

    def _release_large(self) -> None:
        if self._holds_large and self.large is not None:
            self._holds_large = False
            self.large.release()

    def _close_fds(self) -> None:
        for fd in self.take_fds():
            os.close(fd)

    def _timeout(self, option: int, seconds: float) -> None:
        # The kernel's own time-outs: Python's would cost a poll before every call.
        whole = int(seconds)
        self._peer.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, int((seconds - whole) * 1e6)))


def _descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def _sealed(content: bytearray) -> int:
    """A memfd with ``content`` that nobody can change any more; the caller closes it."""
    fd = os.memfd_create(f"{NAME_PREFIX}message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _CONTENT_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _read(fd: int, length: int) -> bytearray:
    """All of a memfd. Read, not mapped: holes cost no memory here, and nothing can fault."""
    content = bytearray(length)
    done, rest = 0, memoryview(content)
    while done < length:
        count = os.preadv(fd, [rest[done:]], done)
        if not count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += count
    return content
