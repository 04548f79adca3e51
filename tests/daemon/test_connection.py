"""The engine's side of a connection: asking, being answered, and the end of it."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.daemon.wire import pair
from vllm_moe_offload.client.connection import Connection, DaemonGoneError, RefusedError
from vllm_moe_offload.ipc.protocol import (
    Attach,
    Attached,
    Demand,
    GetStatus,
    Hint,
    ImportSlots,
    Refused,
    Request,
    SlotsImported,
    Stopping,
    Supplied,
)
from vllm_moe_offload.ipc.transport import Channel

Server = Channel[Request]
ATTACH = Attach("f", 1, 0, False, "g", 0)


@pytest.fixture
def connection() -> Iterator[tuple[Connection, Server]]:
    peer, ours = pair()
    client = Connection(peer, "the daemon", 10)
    server = Channel(ours, msgspec.msgpack.Decoder(Request), max_fds=1)
    server.wait_at_most(10)
    yield client, server
    client.close()
    server.close()


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


def test_a_request_gets_its_reply(connection: tuple[Connection, Server]) -> None:
    client, server = connection
    thread = answer(server, Supplied(1, b"\0\0\0\0", 0, 0))
    assert client.request(Demand(1, 0, b"\5\0\0\0")).slots == b"\0\0\0\0"
    thread.join()


def test_descriptors_come_with_a_reply(connection: tuple[Connection, Server], tmp_path: Path) -> None:
    client, server = connection
    with (tmp_path / "arena").open("w") as file:
        thread = answer(server, Attached(0, False, []), fds=(file.fileno(),) * 40)
        assert client.request(ATTACH) == Attached(0, False, [])
        thread.join()
    fds = client.take_fds()
    assert len(fds) == 40
    for fd in fds:
        assert os.path.samestat(os.fstat(fd), (tmp_path / "arena").stat())
        os.close(fd)


def test_a_refusal_is_an_error_and_leaves_the_connection_usable(connection: tuple[Connection, Server]) -> None:
    client, server = connection
    thread = answer(server, Refused("no such store"), SlotsImported(1))
    with pytest.raises(RefusedError, match="the daemon refuses: no such store"):
        client.request(ATTACH)
    assert client.request(ImportSlots(0, b"", b""), ()) == SlotsImported(1)
    thread.join()


def test_a_refusal_sent_before_the_connection_was_closed_is_heard(connection: tuple[Connection, Server]) -> None:
    client, server = connection
    server.send(Refused("too many"))
    server.close()
    with pytest.raises(RefusedError, match="too many"):
        client.request(GetStatus())


def test_a_peer_that_leaves_is_gone(connection: tuple[Connection, Server]) -> None:
    client, server = connection
    thread = answer(server, None)
    with pytest.raises(DaemonGoneError, match="the daemon closed the connection"):
        client.request(GetStatus())
    thread.join()
    with pytest.raises(DaemonGoneError, match="the daemon is gone"):
        client.send(Hint(0, b""))


def test_another_reply_than_asked_for_ends_the_connection(connection: tuple[Connection, Server]) -> None:
    client, server = connection
    thread = answer(server, Stopping())
    with pytest.raises(DaemonGoneError, match="answered with Stopping"):
        client.request(GetStatus())
    thread.join()
    assert server.receive() is None


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next() -> None:
    peer, ours = pair()
    client = Connection(peer, "the daemon", 0.05)
    with pytest.raises(DaemonGoneError, match=r"the daemon sent nothing for 0\.05 s"):
        client.request(GetStatus())
    ours.close()
    with pytest.raises(DaemonGoneError):
        client.request(GetStatus())
    client.close()


def test_closing_frees_a_request_that_waits(connection: tuple[Connection, Server]) -> None:
    client, server = connection
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


def test_hints_may_be_sent_while_another_thread_asks(connection: tuple[Connection, Server]) -> None:
    client, server = connection
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
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "deaf"))
        listener.listen(1)
        with pytest.raises(DaemonGoneError, match=r"sent nothing for 0\.05 s"):
            Connection.connect(tmp_path / "deaf", "control", 0.05)


def test_a_daemon_of_a_release_with_another_kind_of_socket_is_named(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "older"))
        listener.listen(1)
        with pytest.raises(RefusedError, match=r"is of another release of vllm-moe-offload .*with the same release"):
            Connection.connect(tmp_path / "older", "control", 1)
