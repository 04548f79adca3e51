"""Whole messages over a Unix stream socket: length prefix, limits, deadlines, descriptors. Must not know their meaning.

A frame is the payload's length (4 bytes, little-endian) and the payload. A peer may be silent between frames for as
long as its ``patience`` says, but a frame once begun must be over within ``FRAME_SECONDS``, in either direction.

Descriptors arrive with the first byte of their frame. The kernel never delivers the bytes after theirs in the same
read, but may deliver earlier frames with them; so they wait in ``fds`` until they are taken, and what is still there
when everything received has been read belongs to nobody: it is closed and the peer is refused.
"""

import os
import select
import socket
import struct
import threading
import time
from array import array
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from ..errors import OffloadError
from .protocol import SMALL_FRAME_BYTES, Message

FRAME_SECONDS = 10.0
LARGE_MESSAGES = 4
"""Handled at a time by one process that bounds them; see ``FramedSocket.large``."""
BUFFER_BYTES = 1 << 16

_LENGTH = struct.Struct("<I")
_TIMEVAL = struct.Struct("@ll")
_RECEIVE_FLAGS = socket.MSG_CMSG_CLOEXEC

M = TypeVar("M")


class PeerError(OffloadError):
    """The other side broke the protocol; nothing it sends can be understood any more."""


class SilentPeerError(PeerError):
    """The other side sent nothing for as long as it was waited for."""


class FramedSocket(Generic[M]):
    """Sends and receives messages over a connected socket, which it owns.

    One thread may send while another receives; no more than that.

    Args:
        peer: a connected stream socket.
        decoder: of the messages that may come in.
        max_fds: descriptors the other side may send with a frame.
    """

    def __init__(self, peer: socket.socket, decoder: "msgspec.msgpack.Decoder[M]", max_fds: int) -> None:
        peer.setblocking(True)
        self.limit = SMALL_FRAME_BYTES
        """Bytes of payload that are accepted and sent at most."""
        self.large: threading.Semaphore | None = None
        """Who receives or answers more than ``SMALL_FRAME_BYTES`` holds it until the next ``receive``: it bounds the
        memory that connections which share it take together."""
        self._holds_large = False
        self.fds: list[int] = []
        self._peer = peer
        self._decoder = decoder
        self._max_fds = max_fds
        self._ancillary_bytes = socket.CMSG_LEN(max_fds * 4)
        self._encode_into = msgspec.msgpack.Encoder().encode_into
        self._outgoing = bytearray(_LENGTH.size)
        self._patience = 0.0
        self._timeout(socket.SO_SNDTIMEO, FRAME_SECONDS)
        self._use_buffer(bytearray(BUFFER_BYTES))
        self._start = self._end = 0

    def wait_at_most(self, seconds: float) -> None:
        """How long ``receive`` waits for a frame to begin; 0 is for ever."""
        if seconds != self._patience:
            self._timeout(socket.SO_RCVTIMEO, seconds)
            self._patience = seconds

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message, with descriptors (they stay open here).

        Raises:
            ValueError: the message is larger than ``limit``; nothing was sent.
            SilentPeerError: the other side did not read it in time.
            OSError: there is no other side any more.
        """
        try:
            self._send(message, fds)
        finally:
            if len(self._outgoing) > BUFFER_BYTES:
                self._outgoing = bytearray(_LENGTH.size)

    def _send(self, message: Message, fds: Sequence[int]) -> None:
        frame = self._outgoing
        self._encode_into(message, frame, _LENGTH.size)
        total = len(frame)
        if total - _LENGTH.size > self.limit:
            raise ValueError(f"{type(message).__name__} of {total} bytes; at most {self.limit} can be sent")
        _LENGTH.pack_into(frame, 0, total - _LENGTH.size)
        try:
            if fds:
                sent = self._peer.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))])
            else:
                sent = self._peer.send(frame)
        except BlockingIOError:
            raise SilentPeerError(f"did not read a message for {FRAME_SECONDS:g} s") from None
        if sent < total:
            self._send_rest(memoryview(frame)[sent:])

    def receive(self) -> M | None:
        """The next message; None if the other side closed the connection after its last one.

        Raises:
            PeerError: what came is too long, unfinished in time, no message, or brought descriptors unasked.
            SilentPeerError: nothing came in the time set by ``wait_at_most``.
        """
        self._release_large()
        if self._start == self._end:
            self._start = self._end = 0
            if self.fds:
                self._close_fds()
                raise PeerError("sent descriptors that nobody asked for")
            if not self._fill():
                return None
        if self._frame_end() > self._end:
            self._finish_frame()
        start, end = self._start + _LENGTH.size, self._frame_end()
        self._start = end
        try:
            return self._decoder.decode(self._view[start:end])
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise PeerError(f"sent no message that is known here: {error}") from None
        finally:
            if len(self._buffer) > BUFFER_BYTES:
                self._compact(BUFFER_BYTES)

    def comes_within(self, seconds: float) -> bool:
        """Whether ``receive`` has something to look at before so much time is over: a message, a part of one, or the
        end of the connection."""
        if self._start < self._end:
            return True
        readable = select.poll()
        readable.register(self._peer, select.POLLIN)
        return bool(readable.poll(seconds * 1000))

    def take_fds(self) -> list[int]:
        """The descriptors that came with the message received last; they are the caller's now."""
        taken, self.fds = self.fds, []
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

    def _frame_end(self) -> int:
        """Where the frame at ``_start`` ends in the buffer, as far as is known yet.

        Raises:
            PeerError: it is longer than allowed.
        """
        begun = self._start + _LENGTH.size
        if begun > self._end:
            return begun
        length: int = _LENGTH.unpack_from(self._buffer, self._start)[0]
        if length > self.limit:
            raise PeerError(f"announced a message of {length} bytes; at most {self.limit} are accepted")
        return begun + length

    def _finish_frame(self) -> None:
        """Receive what is missing of the frame at ``_start``."""
        deadline = time.monotonic() + FRAME_SECONDS
        readable = select.poll()
        readable.register(self._peer, select.POLLIN)
        if self._frame_end() - self._start > SMALL_FRAME_BYTES + _LENGTH.size:
            self.hold_large(FRAME_SECONDS)
        while (missing := self._frame_end() - self._end) > 0:
            if self._end == len(self._buffer):
                held = self._end - self._start
                self._compact(max(BUFFER_BYTES, min(2 * held, held + missing)))
            left = deadline - time.monotonic()
            if left <= 0 or not readable.poll(left * 1000):
                raise SilentPeerError(f"began a message and did not finish it within {FRAME_SECONDS:g} s")
            if not self._fill():
                raise PeerError("left in the middle of a message")

    def _fill(self) -> bool:
        """Receive once into the free end of the buffer; False if the other side is gone."""
        buffers = self._whole if self._end == 0 else [self._view[self._end :]]
        try:
            count, ancillary, flags, _ = self._peer.recvmsg_into(buffers, self._ancillary_bytes, _RECEIVE_FLAGS)
        except BlockingIOError:
            raise SilentPeerError(f"sent nothing for {self._patience:g} s") from None
        except ConnectionError:
            return False
        if ancillary or flags & socket.MSG_CTRUNC:
            self._keep_fds(ancillary, flags)
        self._end += count
        return count > 0

    def _keep_fds(self, ancillary: list[tuple[int, int, bytes]], flags: int) -> None:
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self.fds.extend(array("i", data[: len(data) - len(data) % 4]))
        if flags & socket.MSG_CTRUNC or len(self.fds) > self._max_fds:
            self._close_fds()
            raise PeerError(f"sent too many descriptors; at most {self._max_fds} are accepted")

    def _release_large(self) -> None:
        if self._holds_large and self.large is not None:
            self._holds_large = False
            self.large.release()

    def _close_fds(self) -> None:
        for fd in self.take_fds():
            os.close(fd)

    def _send_rest(self, rest: memoryview) -> None:
        deadline = time.monotonic() + FRAME_SECONDS
        writable = select.poll()
        writable.register(self._peer, select.POLLOUT)
        while rest:
            left = deadline - time.monotonic()
            if left <= 0 or not writable.poll(left * 1000):
                raise SilentPeerError(f"did not read a message within {FRAME_SECONDS:g} s")
            rest = rest[self._peer.send(rest, socket.MSG_DONTWAIT) :]

    def _compact(self, size: int) -> None:
        """Move what is not read yet to the front of a new buffer of at least ``size`` bytes."""
        held = self._view[self._start : self._end]
        buffer = bytearray(max(size, len(held)))
        buffer[: len(held)] = held
        self._start, self._end = 0, len(held)
        self._use_buffer(buffer)

    def _use_buffer(self, buffer: bytearray) -> None:
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._whole: list[Any] = [self._view]

    def _timeout(self, option: int, seconds: float) -> None:
        # The kernel's own time-outs: Python's would cost a poll before every call.
        whole = int(seconds)
        self._peer.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, int((seconds - whole) * 1e6)))
