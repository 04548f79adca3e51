"""Messages on their way: whole or refused, limits, deadlines, descriptors, messages in memory."""

import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from tests.daemon.wire import ALL_SEALS, NULL, in_memfd, memfd, open_fds, packet, pair, send_memfd, send_with_fd
from vllm_moe_offload.ipc import transport
from vllm_moe_offload.ipc.protocol import (
    HISTORY_MESSAGE_BYTES,
    MESSAGE_BYTES,
    Demand,
    GetStatus,
    Hint,
    ImportSlots,
    Message,
    Refused,
    Request,
    Stopping,
)
from vllm_moe_offload.ipc.transport import PACKET_BYTES, Channel, PeerError, SilentPeerError

Server = Channel[Request]


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Server]]:
    """A peer that writes what it likes, and the server's side of its connection."""
    before = open_fds()
    peer, ours = pair()
    server = Channel(ours, msgspec.msgpack.Decoder(Request), max_fds=1)
    server.wait_at_most(10)
    yield peer, server
    peer.close()
    server.close()
    assert open_fds() == before


def filled(length: int) -> Hint:
    """A message of so many bytes."""
    most = length - len(packet(Hint(0, b"")))
    return next(hint for size in range(most, 0, -1) if len(packet(hint := Hint(0, b"x" * size))) == length)


def sent_and_received(sender: Server, receiver: Server, message: Message, fds: Sequence[int] = ()) -> Message | None:
    sending = threading.Thread(target=sender.send, args=(message, fds))
    sending.start()
    received = receiver.receive()
    sending.join(10)
    assert not sending.is_alive()
    return received


def test_messages_arrive_whole_and_in_their_order(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    messages = [Demand(i, 0, bytes(4 * i)) for i in range(30)]
    for message in messages:
        peer.send(packet(message))
    assert [server.receive() for _ in messages] == messages


def test_a_message_may_be_as_long_as_the_limit_and_no_longer(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    message = filled(server.limit)
    send_memfd(peer, memfd(packet(message)), server.limit)
    peer.send(packet(Hint(1, b"")))
    assert server.receive() == message
    assert server.receive() == Hint(1, b"")
    before = open_fds()
    send_memfd(peer, memfd(packet(message) + b"x"), server.limit + 1)
    with pytest.raises(PeerError, match=f"at most {server.limit} are accepted"):
        server.receive()
    assert open_fds() == before


@pytest.mark.parametrize("length", [PACKET_BYTES - 1, PACKET_BYTES, PACKET_BYTES + 1, MESSAGE_BYTES])
def test_messages_of_every_length_arrive(length: int) -> None:
    before = open_fds()
    theirs, ours = pair()
    sender: Server = Channel(theirs, msgspec.msgpack.Decoder(Request), max_fds=1)
    receiver: Server = Channel(ours, msgspec.msgpack.Decoder(Request), max_fds=1)
    message = filled(length)
    with NULL.open() as file:
        for fds in ([], [file.fileno()]):
            assert sent_and_received(sender, receiver, message, fds) == message
            (*taken,) = receiver.take_fds()
            assert [os.path.samestat(os.fstat(fd), NULL.stat()) for fd in taken] == [True] * len(fds)
            for fd in taken:
                os.close(fd)
    sender.close()
    receiver.close()
    assert open_fds() == before


def test_a_system_with_small_packets_needs_more_memory_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """``net.core.wmem_default`` may be lower than usual."""
    theirs, ours = pair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    small = theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    assert small < PACKET_BYTES // 8
    sender: Server = Channel(theirs, msgspec.msgpack.Decoder(Request), max_fds=0)
    receiver: Server = Channel(ours, msgspec.msgpack.Decoder(Request), max_fds=0)
    for length in (100, small // 2, small // 2 + 1, small, PACKET_BYTES):
        assert sent_and_received(sender, receiver, filled(length)) == filled(length)
    sender.close()
    receiver.close()


def test_few_large_messages_are_handled_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is small passes; what is large waits for its turn, and is refused if that does not come."""
    large, turns = Hint(0, bytes(2 * MESSAGE_BYTES)), threading.BoundedSemaphore(1)
    servers: list[Server] = []
    peers: list[socket.socket] = []
    for _ in range(3):
        peer, ours = pair()
        peers.append(peer)
        servers.append(Channel(ours, msgspec.msgpack.Decoder(Request), max_fds=0))
        servers[-1].large, servers[-1].limit = turns, HISTORY_MESSAGE_BYTES
        peer.send(packet(GetStatus()))
        send_memfd(peer, memfd(packet(large)), len(packet(large)))
        peer.send(packet(GetStatus()))
    first, second, third = servers
    assert [server.receive() for server in servers] == [GetStatus()] * 3
    assert first.receive() == large
    with monkeypatch.context() as impatient:
        impatient.setattr(transport, "PEER_SECONDS", 0.1)
        with pytest.raises(PeerError, match="while others were being handled"):
            second.receive()
        second.close()
    assert first.receive() == GetStatus(), "the first has been handled"
    assert third.receive() == large
    for channel in (*servers, *peers):
        channel.close()
    assert turns.acquire(timeout=0), "whoever closes gives its turn back"


def test_what_a_large_message_took_is_given_back(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    server.limit = HISTORY_MESSAGE_BYTES
    sending = threading.Thread(target=server.send, args=(Refused("x" * (2 * MESSAGE_BYTES)),))
    sending.start()
    _, fds, _, _ = socket.recv_fds(peer, 100, 1)
    sending.join(10)
    assert len(server._outgoing) < PACKET_BYTES
    assert os.fstat(fds[0]).st_size > 2 * MESSAGE_BYTES
    os.close(fds[0])


def test_too_long_a_message_is_not_sent(raw: tuple[socket.socket, Server]) -> None:
    _, server = raw
    with pytest.raises(ValueError, match="at most"):
        server.send(Refused("x" * server.limit))


NO_MESSAGES = {
    "a reserved byte": b"\xc1",
    "an empty map": b"\x80",
    "numbers": b"\xff" * 9,
    "a deep hole": b"\x91" * 60_000,
    "an unknown type": packet({"type": "Hullo"}),
    "half a message": packet(GetStatus())[:-1],
    "two messages": packet(GetStatus()) * 2,
    "a memfd's place cut short": in_memfd(5)[:-1],
}


@pytest.mark.parametrize("case", NO_MESSAGES)
@pytest.mark.parametrize("in_memory", [False, True])
def test_what_is_no_message_is_refused(raw: tuple[socket.socket, Server], case: str, in_memory: bool) -> None:
    peer, server = raw
    before = open_fds()
    payload = NO_MESSAGES[case]
    if in_memory:
        send_memfd(peer, memfd(payload), len(payload))
    else:
        send_with_fd(peer, payload)
    with pytest.raises(PeerError, match="no message that is known"):
        server.receive()
    assert open_fds() == before, "what came with it is closed"


def test_an_empty_packet_is_refused_and_no_end(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    for count in (0, 1):
        before = open_fds()
        if count:
            send_with_fd(peer, b"")
        else:
            peer.send(b"")
        peer.send(packet(GetStatus()))
        with pytest.raises(PeerError, match="sent an empty packet"):
            server.receive()
        assert open_fds() == before
        assert server.receive() == GetStatus()
    peer.send(b"")
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(PeerError, match="sent an empty packet"):
        server.receive()
    assert server.receive() is None
    assert server.receive() is None


def test_a_packet_larger_than_any_is_refused(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    before = open_fds()
    send_with_fd(peer, packet(filled(PACKET_BYTES + 1)))
    peer.send(packet(filled(PACKET_BYTES)))
    with pytest.raises(PeerError, match=f"a packet of more than {PACKET_BYTES} bytes"):
        server.receive()
    assert open_fds() == before
    assert server.receive() == filled(PACKET_BYTES)


def test_closing_is_the_end_after_the_last_message(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    server.send(Stopping())
    peer.send(packet(GetStatus()))
    peer.close()
    assert server.receive() == GetStatus(), "although it left without reading"
    assert server.receive() is None
    with pytest.raises(ConnectionError):
        server.send(Stopping())


# --- messages in memory ---

CONTENT = packet(GetStatus())


def file_with_content() -> int:
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    os.write(fd, CONTENT)
    return fd


def pipe() -> int:
    fd, other_end = os.pipe2(os.O_CLOEXEC)
    os.close(other_end)
    return fd


def write_only() -> int:
    fd = memfd(CONTENT)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    finally:
        os.close(fd)


UNTRUSTED = {
    "unsealed": (
        lambda: memfd(CONTENT, 0),
        "trusted: .* lacks the seals F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_SEAL",
    ),
    "may grow": (lambda: memfd(CONTENT, ALL_SEALS & ~fcntl.F_SEAL_GROW), "trusted: .* lacks the seals F_SEAL_GROW"),
    "may shrink": (
        lambda: memfd(CONTENT, ALL_SEALS & ~fcntl.F_SEAL_SHRINK),
        "trusted: .* lacks the seals F_SEAL_SHRINK",
    ),
    "may be written": (
        lambda: memfd(CONTENT, ALL_SEALS & ~fcntl.F_SEAL_WRITE),
        "trusted: .* lacks the seals F_SEAL_WRITE",
    ),
    "may be sealed": (
        lambda: memfd(CONTENT, ALL_SEALS & ~fcntl.F_SEAL_SEAL),
        "trusted: .* lacks the seals F_SEAL_SEAL",
    ),
    "too short": (
        lambda: memfd(CONTENT[:-1]),
        f"trusted: .* has {len(CONTENT) - 1} bytes where {len(CONTENT)} were announced",
    ),
    "too long": (
        lambda: memfd(CONTENT + b"x"),
        f"trusted: .* has {len(CONTENT) + 1} bytes where {len(CONTENT)} were announced",
    ),
    "empty": (lambda: memfd(b""), f"trusted: .* has 0 bytes where {len(CONTENT)} were announced"),
    "a file": (file_with_content, "trusted: .* is no memfd"),
    "a pipe": (pipe, "trusted: .* is no memfd"),
    "a device": (lambda: os.open("/dev/zero", os.O_RDWR), "trusted: .* is no memfd"),
    "not to be read": (write_only, "read: Bad file descriptor"),
}


@pytest.mark.parametrize("case", UNTRUSTED)
def test_memory_that_may_change_or_is_none_is_refused(raw: tuple[socket.socket, Server], case: str) -> None:
    peer, server = raw
    before = open_fds()
    make, reason = UNTRUSTED[case]
    with NULL.open() as file:
        send_memfd(peer, make(), len(CONTENT), file.fileno())
    with pytest.raises(PeerError, match=f"sent a message in memory that cannot be {reason}"):
        server.receive()
    assert open_fds() == before, "what came is closed"


def test_memory_that_grows_while_it_is_looked_at_is_refused(
    raw: tuple[socket.socket, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its seals are looked at before its size: a size that can still change says nothing."""
    peer, server = raw
    fd, look = memfd(CONTENT, 0), os.fstat

    def grow_and_look(number: int) -> os.stat_result:
        status = look(number)
        os.write(fd, b"more")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)
        return status

    socket.send_fds(peer, [in_memfd(len(CONTENT))], [fd])
    with monkeypatch.context() as patch, pytest.raises(PeerError, match="lacks the seals"):
        patch.setattr(os, "fstat", grow_and_look)
        server.receive()
    os.close(fd)


def test_memory_that_is_missing_is_refused(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    peer.send(in_memfd(len(CONTENT)))
    with pytest.raises(PeerError, match="announced a message in a memfd and did not send it"):
        server.receive()


def test_holes_in_memory_cost_nothing(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    fd = os.memfd_create("hole", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MESSAGE_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)
    send_memfd(peer, os.dup(fd), MESSAGE_BYTES)
    with pytest.raises(PeerError, match="no message that is known"):
        server.receive()
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)


def test_a_message_in_memory_and_its_descriptors(raw: tuple[socket.socket, Server]) -> None:
    """The memfd is the last descriptor, and does not count among those of the message."""
    peer, server = raw
    before = open_fds()
    adopt = packet(ImportSlots(0, b"", b""))
    with NULL.open() as file:
        send_memfd(peer, memfd(adopt), len(adopt), file.fileno())
        assert server.receive() == ImportSlots(0, b"", b"")
        (fd,) = server.take_fds()
        assert os.path.samestat(os.fstat(fd), NULL.stat())
        os.close(fd)
        send_memfd(peer, memfd(adopt), len(adopt), file.fileno(), file.fileno())
        with pytest.raises(PeerError, match="at most 1 are accepted"):
            server.receive()
    assert open_fds() == before


# --- silence ---


def test_silence_is_waited_for_as_long_as_said(raw: tuple[socket.socket, Server]) -> None:
    _, server = raw
    server.wait_at_most(0.05)
    with pytest.raises(SilentPeerError, match=r"nothing for 0\.05 s"):
        server.receive()


@pytest.mark.parametrize("length", [10, PACKET_BYTES, 100_000])
def test_a_reader_that_never_reads_does_not_hold_the_writer(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(transport, "PEER_SECONDS", 0.2)
    before = open_fds()
    peer, ours = pair()
    server: Server = Channel(ours, msgspec.msgpack.Decoder(Request), max_fds=1)
    begun = time.monotonic()
    with pytest.raises(SilentPeerError, match="did not read"):
        for _ in range(10_000):
            server.send(Refused("x" * length))
    assert time.monotonic() - begun < 5
    peer.close()
    server.close()
    assert open_fds() == before


@pytest.mark.parametrize("theirs", [True, False])
def test_whoever_waits_until_a_message_in_memory_is_read_sees_the_end(
    raw: tuple[socket.socket, Server], theirs: bool
) -> None:
    peer, server = raw
    sending = threading.Thread(target=server.send, args=(Refused("x" * (2 * PACKET_BYTES)),))
    sending.start()
    sending.join(0.1)
    assert sending.is_alive(), "nobody has read it"
    if theirs:
        peer.close()
    else:
        server.shut_down()
    sending.join(5)
    assert not sending.is_alive()


# --- descriptors ---


def test_descriptors_come_with_their_message(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    peer.send(packet(Hint(0, b"")))
    send_with_fd(peer, packet(ImportSlots(0, b"", b"")))
    assert server.receive() == Hint(0, b"")
    assert server.take_fds() == []
    assert server.receive() == ImportSlots(0, b"", b"")
    (fd,) = server.take_fds()
    assert os.path.samestat(os.fstat(fd), NULL.stat())
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_descriptors_nobody_takes_are_closed(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    before = open_fds()
    send_with_fd(peer, packet(Hint(0, b"")))
    server.receive()
    with pytest.raises(PeerError, match="nobody asked for"):
        server.receive()
    assert open_fds() == before


@pytest.mark.parametrize("count", [2, 3, 200])
@pytest.mark.parametrize("data", [packet(ImportSlots(0, b"", b"")), in_memfd(10), b"", b"\1"])
def test_more_descriptors_than_allowed_are_closed(raw: tuple[socket.socket, Server], count: int, data: bytes) -> None:
    peer, server = raw
    before = open_fds()
    send_with_fd(peer, data, count)
    with pytest.raises(PeerError, match=r"at most 1 are accepted|empty packet|cannot be trusted"):
        server.receive()
    assert open_fds() == before


def test_a_process_that_may_open_no_more_files_says_so(raw: tuple[socket.socket, Server]) -> None:
    import resource

    peer, server = raw
    send_with_fd(peer, packet(ImportSlots(0, b"", b"")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(PeerError, match="may not open so many files"):
            server.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
