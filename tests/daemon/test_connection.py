"""Framing and the client's side: whole messages, limits, deadlines, descriptors."""

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from wire import NULL, frame, open_fds, send_with_fd

from vllm_moe_offload.daemon import framing
from vllm_moe_offload.daemon.connection import Connection, DaemonGoneError, RefusedError
from vllm_moe_offload.daemon.framing import FramedSocket, PeerError, SilentPeerError
from vllm_moe_offload.daemon.protocol import (
    LARGE_FRAME_BYTES,
    SMALL_FRAME_BYTES,
    Adopt,
    Adopted,
    Attach,
    Attached,
    Demand,
    GetStatus,
    Hint,
    Refused,
    Request,
    Stopping,
    Supplied,
)

Server = FramedSocket[Request]
ATTACH = Attach("f", 1, 0, False, "g", 0)


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Server]]:
    """A peer that writes what it likes, and the server's side of its connection."""
    before = open_fds()
    peer, ours = socket.socketpair()
    server = FramedSocket(ours, msgspec.msgpack.Decoder(Request), max_fds=1)
    server.wait_at_most(10)
    yield peer, server
    peer.close()
    server.close()
    assert open_fds() == before


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Server]]:
    peer, ours = socket.socketpair()
    client = Connection(peer, "the daemon", 10)
    server = FramedSocket(ours, msgspec.msgpack.Decoder(Request), max_fds=1)
    server.wait_at_most(10)
    yield client, server
    client.close()
    server.close()


def test_messages_arrive_however_they_are_cut(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    messages = [Demand(i, 0, bytes(4 * i)) for i in range(30)]
    data = b"".join(map(frame, messages))

    def dribble() -> None:
        for i in range(0, len(data), 7):
            peer.send(data[i : i + 7])

    writer = threading.Thread(target=dribble)
    writer.start()
    assert [server.receive() for _ in messages] == messages
    writer.join()
    peer.send(data)
    assert [server.receive() for _ in messages] == messages


def test_a_message_may_be_as_long_as_the_limit_and_no_longer(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    message = Hint(0, b"x" * (server.limit - len(msgspec.msgpack.encode(Hint(0, b""))) - 3))
    data = frame(message)
    assert len(data) == server.limit + 4
    writer = threading.Thread(target=peer.sendall, args=(data + frame(Hint(1, b"")),))
    writer.start()
    assert server.receive() == message
    assert server.receive() == Hint(1, b"")
    writer.join()
    peer.send(struct.pack("<I", server.limit + 1))
    with pytest.raises(PeerError, match=f"at most {server.limit} are accepted"):
        server.receive()


def _send_if_read(peer: socket.socket, data: bytes) -> None:
    with peer, suppress(BrokenPipeError, ConnectionResetError):
        peer.sendall(data)


def test_few_large_messages_are_handled_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is small passes; what is large waits for its turn, and is refused if that does not come."""
    large, turns = Hint(0, bytes(2 * SMALL_FRAME_BYTES)), threading.BoundedSemaphore(1)
    servers: list[Server] = []
    writers: list[threading.Thread] = []
    for _ in range(3):
        peer, ours = socket.socketpair()
        servers.append(FramedSocket(ours, msgspec.msgpack.Decoder(Request), max_fds=0))
        servers[-1].large, servers[-1].limit = turns, LARGE_FRAME_BYTES
        data = frame(GetStatus()) + frame(large) + frame(GetStatus())
        writers.append(threading.Thread(target=_send_if_read, args=(peer, data)))
        writers[-1].start()
    first, second, third = servers
    assert [server.receive() for server in servers] == [GetStatus()] * 3
    assert first.receive() == large
    with monkeypatch.context() as impatient:
        impatient.setattr(framing, "FRAME_SECONDS", 0.1)
        with pytest.raises(PeerError, match="while others were being handled"):
            second.receive()
        second.close()
    assert first.receive() == GetStatus(), "the first has been handled"
    assert third.receive() == large
    for server in servers:
        server.close()
    assert turns.acquire(timeout=0), "whoever closes gives its turn back"
    for writer in writers:
        writer.join(10)


def test_what_a_large_message_took_is_given_back(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    server.limit = LARGE_FRAME_BYTES
    message = Refused("x" * (2 * SMALL_FRAME_BYTES))
    with peer.makefile("rb") as end:
        reader = threading.Thread(target=end.read, args=(len(frame(message)),))
        reader.start()
        server.send(message)
        reader.join(10)
    assert len(server._outgoing) < framing.BUFFER_BYTES


def test_too_long_a_message_is_not_sent(pair: tuple[Connection, Server]) -> None:
    _, server = pair
    with pytest.raises(ValueError, match="at most"):
        server.send(Refused("x" * server.limit))


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"\x80", b"\xff" * 9, b"\x91" * 100_000, frame({"type": "Hullo"})[4:]]
)
def test_what_is_no_message_is_refused(raw: tuple[socket.socket, Server], payload: bytes) -> None:
    peer, server = raw
    peer.sendall(struct.pack("<I", len(payload)) + payload)
    with pytest.raises(PeerError, match="no message that is known"):
        server.receive()


def test_closing_between_messages_is_the_end_and_within_one_an_error(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    peer.send(frame(GetStatus()) + frame(GetStatus())[:-1])
    peer.shutdown(socket.SHUT_WR)
    assert server.receive() == GetStatus()
    with pytest.raises(PeerError, match="in the middle"):
        server.receive()


def test_a_frame_that_drips_is_given_up(raw: tuple[socket.socket, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    peer, server = raw
    monkeypatch.setattr(framing, "FRAME_SECONDS", 0.3)
    over = threading.Event()

    def drip() -> None:
        peer.send(struct.pack("<I", 1000))
        while not over.wait(0.02):
            peer.send(b"x")

    writer = threading.Thread(target=drip)
    writer.start()
    begun = time.monotonic()
    with pytest.raises(SilentPeerError, match=r"did not finish it within 0\.3 s"):
        server.receive()
    assert 0.25 < time.monotonic() - begun < 5
    over.set()
    writer.join()


def test_silence_is_waited_for_as_long_as_said(raw: tuple[socket.socket, Server]) -> None:
    _, server = raw
    server.wait_at_most(0.05)
    with pytest.raises(SilentPeerError, match=r"nothing for 0\.05 s"):
        server.receive()


def test_a_reader_that_never_reads_does_not_hold_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "FRAME_SECONDS", 0.2)
    peer, ours = socket.socketpair()
    server = FramedSocket(ours, msgspec.msgpack.Decoder(Request), max_fds=1)
    with pytest.raises(SilentPeerError, match="did not read"):
        for _ in range(100):
            server.send(Refused("x" * 100_000))
    peer.close()
    server.close()


def test_descriptors_come_with_their_message(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    peer.send(frame(Hint(0, b"")))
    send_with_fd(peer, frame(Adopt(0, b"", b"")))
    assert server.receive() == Hint(0, b"")
    assert server.receive() == Adopt(0, b"", b"")
    (fd,) = server.take_fds()
    assert os.path.samestat(os.fstat(fd), NULL.stat())
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_descriptors_nobody_takes_are_closed(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    before = open_fds()
    send_with_fd(peer, frame(Hint(0, b"")))
    server.receive()
    with pytest.raises(PeerError, match="nobody asked for"):
        server.receive()
    assert open_fds() == before


@pytest.mark.parametrize("count", [2, 3, 200])
def test_more_descriptors_than_allowed_are_closed(raw: tuple[socket.socket, Server], count: int) -> None:
    peer, server = raw
    before = open_fds()
    send_with_fd(peer, frame(Adopt(0, b"", b"")), count)
    with pytest.raises(PeerError, match="at most 1 are accepted"):
        server.receive()
    assert open_fds() == before


def test_descriptors_one_by_one_are_limited_too(raw: tuple[socket.socket, Server]) -> None:
    peer, server = raw
    before = open_fds()
    data = frame(Adopt(0, b"", b""))
    send_with_fd(peer, data[:3])
    send_with_fd(peer, data[3:])
    with pytest.raises(PeerError, match="at most 1 are accepted"):
        server.receive()
    assert open_fds() == before


def answer(server: Server, *replies: object, fds: tuple[int, ...] = ()) -> threading.Thread:
    """Answers as many requests; None leaves."""

    def serve() -> None:
        for reply in replies:
            server.receive()
            if reply is None:
                server.shut_down()
            else:
                server.send(reply, fds)  # type: ignore[arg-type]

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_a_request_gets_its_reply(pair: tuple[Connection, Server]) -> None:
    client, server = pair
    thread = answer(server, Supplied(1, b"\0\0\0\0", 0, 0))
    assert client.request(Demand(1, 0, b"\5\0\0\0")).slots == b"\0\0\0\0"
    thread.join()


def test_descriptors_come_with_a_reply(pair: tuple[Connection, Server], tmp_path: Path) -> None:
    client, server = pair
    with (tmp_path / "arena").open("w") as file:
        thread = answer(server, Attached(0, False, []), fds=(file.fileno(),) * 40)
        assert client.request(ATTACH) == Attached(0, False, [])
        thread.join()
    fds = client.take_fds()
    assert len(fds) == 40
    for fd in fds:
        assert os.path.samestat(os.fstat(fd), (tmp_path / "arena").stat())
        os.close(fd)


def test_a_refusal_is_an_error_and_leaves_the_connection_usable(pair: tuple[Connection, Server]) -> None:
    client, server = pair
    thread = answer(server, Refused("no such store"), Adopted(1))
    with pytest.raises(RefusedError, match="the daemon refuses: no such store"):
        client.request(ATTACH)
    assert client.request(Adopt(0, b"", b""), ()) == Adopted(1)
    thread.join()


def test_a_refusal_sent_before_the_connection_was_closed_is_heard(pair: tuple[Connection, Server]) -> None:
    client, server = pair
    server.send(Refused("too many"))
    server.close()
    with pytest.raises(RefusedError, match="too many"):
        client.request(GetStatus())


def test_a_peer_that_leaves_is_gone(pair: tuple[Connection, Server]) -> None:
    client, server = pair
    thread = answer(server, None)
    with pytest.raises(DaemonGoneError, match="the daemon closed the connection"):
        client.request(GetStatus())
    thread.join()
    with pytest.raises(DaemonGoneError, match="the daemon is gone"):
        client.send(Hint(0, b""))


def test_another_reply_than_asked_for_ends_the_connection(pair: tuple[Connection, Server]) -> None:
    client, server = pair
    thread = answer(server, Stopping())
    with pytest.raises(DaemonGoneError, match="answered with Stopping"):
        client.request(GetStatus())
    thread.join()
    assert server.receive() is None


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next() -> None:
    peer, ours = socket.socketpair()
    client = Connection(peer, "the daemon", 0.05)
    with pytest.raises(DaemonGoneError, match=r"the daemon sent nothing for 0\.05 s"):
        client.request(GetStatus())
    ours.close()
    with pytest.raises(DaemonGoneError):
        client.request(GetStatus())
    client.close()


def test_closing_frees_a_request_that_waits(pair: tuple[Connection, Server]) -> None:
    client, server = pair
    ended: list[Exception] = []

    def ask() -> None:
        try:
            client.request(GetStatus())
        except DaemonGoneError as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    server.receive()
    client.close()
    thread.join(5)
    assert len(ended) == 1


def test_hints_may_be_sent_while_another_thread_asks(pair: tuple[Connection, Server]) -> None:
    client, server = pair
    rounds = 300
    hinting = threading.Thread(target=lambda: [client.send(Hint(1, b"hint" * i)) for i in range(rounds)])
    hints: list[bytes] = []

    def serve() -> None:
        demands = 0
        while demands < rounds or len(hints) < rounds:
            message = server.receive()
            if isinstance(message, Hint):
                hints.append(message.experts)
            elif isinstance(message, Demand):
                demands += 1
                server.send(Supplied(message.ticket, message.experts, 0, 0))

    serving = threading.Thread(target=serve)
    serving.start()
    hinting.start()
    for ticket in range(rounds):
        assert client.request(Demand(ticket, 0, b"demand" * ticket)).ticket == ticket
    hinting.join()
    serving.join()
    assert hints == [b"hint" * i for i in range(rounds)]


def test_no_daemon_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        DaemonGoneError, match=r"no daemon answers at .*nowhere \(No such file.*vllm-moe-offload daemon"
    ):
        Connection.connect(tmp_path / "nowhere", "control", 1)


def test_a_listener_that_never_accepts_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "deaf"))
        listener.listen(1)
        with pytest.raises(DaemonGoneError, match=r"sent nothing for 0\.05 s"):
            Connection.connect(tmp_path / "deaf", "control", 0.05)
