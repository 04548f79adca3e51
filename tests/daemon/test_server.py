"""The daemon's door: who is let in, what is refused by name, and that the others never notice."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.daemon.served_daemon import ATTACH, ServedDaemon
from tests.daemon.wire import (
    ALL_SEALS,
    NULL,
    SIZE_SEALS,
    connected,
    in_memfd,
    memfd,
    open_fds,
    packet,
    send_memfd,
    send_with_fd,
    threads,
    wait_until,
)
from vllm_moe_offload.client.connection import DaemonGoneError, RefusedError
from vllm_moe_offload.daemon import server
from vllm_moe_offload.ipc import transport
from vllm_moe_offload.ipc.protocol import (
    VERSION,
    Attach,
    Demand,
    GetStatus,
    Hello,
    Hint,
    ImportSlots,
    Refused,
    Reply,
    Stop,
    pack_ids,
)
from vllm_moe_offload.ipc.transport import PACKET_BYTES, Channel

HELLO, CONTROL = packet(Hello(VERSION, "worker")), packet(Hello(VERSION, "control"))
ATTACHING = [HELLO, packet(ATTACH)]
DEMAND = Demand(1, 0, pack_ids(np.array([3, 1])))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDaemon]:
    """A running daemon that must have nothing left when it has ended."""
    fds, running = open_fds(), threads()
    with ServedDaemon(tmp_path / "socket") as served:
        yield served
    wait_until(lambda: threads() == running, "its threads are gone")
    assert open_fds() == fds
    assert not (tmp_path / "socket").exists()


class RawPeer:
    """Writes what it likes to a daemon."""

    def __init__(self, path: Path, *packets: bytes) -> None:
        self.socket = connected(path)
        self.channel: Channel[Reply] = Channel(self.socket, msgspec.msgpack.Decoder(Reply), 4)
        self.channel.wait_at_most(10)
        for data in packets:
            self.socket.send(data)

    def read_to_the_end(self) -> list[Reply]:
        """Every message until the daemon closes the connection."""
        replies = []
        while (reply := self.channel.receive()) is not None:
            replies.append(reply)
            for fd in self.channel.take_fds():
                os.close(fd)
        self.channel.close()
        return replies


def refusal_of(path: Path, *packets: bytes) -> str:
    """The reason in the last message before the daemon closed the connection."""
    last = RawPeer(path, *packets).read_to_the_end()[-1]
    assert isinstance(last, Refused)
    return last.reason


def test_a_worker_is_served(served: ServedDaemon) -> None:
    with served.worker() as worker:
        assert worker.daemon_pid == os.getpid()
        assert worker.request(DEMAND).slots == DEMAND.experts
        worker.send(Hint(0, pack_ids(np.arange(5))))
        with NULL.open() as arena:
            assert worker.request(ImportSlots(0, DEMAND.experts, DEMAND.experts), [arena.fileno()]).records == 2
        attached = served.models.attached[0]
        assert attached.hints == [[0, 1, 2, 3, 4]]
        assert os.path.samestat(attached.imported[0], NULL.stat())
    wait_until(lambda: not served.models.attached, "the worker is detached")


def test_attaching_brings_the_memory(served: ServedDaemon) -> None:
    connection = served.connect()
    attached = connection.request(ATTACH)
    arena, table = connection.take_fds()
    assert attached.worker == 0
    assert os.path.samestat(os.fstat(arena), os.fstat(served.models.arena))
    assert os.path.samestat(os.fstat(table), os.fstat(served.models.table))
    for fd in (arena, table):
        os.close(fd)
    connection.close()


def test_the_pid_of_a_worker_is_what_the_kernel_says(served: ServedDaemon) -> None:
    with served.worker():
        assert ATTACH.pid != os.getpid()
        assert served.models.attached[0].request.pid == os.getpid()


def test_a_store_that_is_not_there_is_refused_and_another_may_be_asked_for(served: ServedDaemon) -> None:
    connection = served.connect()
    with pytest.raises(RefusedError, match=r"no store '\.\./etc' here; there is ffff"):
        connection.request(Attach("../etc", 1, 0, False, "g", 0))
    assert connection.request(ATTACH).worker == 0
    for fd in connection.take_fds():
        os.close(fd)
    connection.close()


def test_many_workers_at_once(served: ServedDaemon) -> None:
    with ExitStack() as stack:
        workers = [stack.enter_context(served.worker()) for _ in range(40)]
        for ticket in (1, 2):
            for worker in workers:
                assert worker.request(Demand(ticket, 0, DEMAND.experts)).ticket == ticket
        control = stack.enter_context(ExitStack())
        connection = served.connect("control")
        control.callback(connection.close)
        (model,) = connection.request(GetStatus()).models
        assert [worker.worker for worker in model.workers] == list(range(40))
    wait_until(lambda: not served.models.attached, "all are detached")


OUT_OF_ORDER = {
    "before Hello": ([packet(DEMAND)], "sent Demand before Hello"),
    "another version": (
        [packet(Hello(1, "worker"))],
        "speaks version 1 of the protocol and this daemon version 2; run",
    ),
    "unknown role": ([packet(Hello(VERSION, "king"))], "wants the role 'king'; there are worker, history, control"),
    "Hello twice": ([HELLO, HELLO], "sent Hello on a connection for Attach, Demand, Hint, ImportSlots"),
    "Demand before Attach": ([HELLO, packet(DEMAND)], "sent Demand before Attach"),
    "Hint before Attach": ([HELLO, packet(Hint(0, b""))], "sent Hint before Attach"),
    "ImportSlots before Attach": ([HELLO, packet(ImportSlots(0, b"", b""))], "sent ImportSlots before Attach"),
    "Attach twice": ([*ATTACHING, packet(ATTACH)], "sent Attach a second time"),
    "ImportSlots without descriptor": ([*ATTACHING, packet(ImportSlots(0, b"", b""))], "without the descriptor"),
    "a worker that asks for the end": ([HELLO, packet(Stop())], "sent Stop on a connection for Attach"),
    "a control that demands": ([CONTROL, packet(DEMAND)], "sent Demand on a connection for GetStatus"),
    "no message": ([HELLO, b"nonsense"], "sent no message that is known here"),
    "nothing": ([HELLO, b""], "sent an empty packet"),
    "half a message": ([HELLO, packet(ATTACH)[:-1]], "sent no message that is known here"),
    "two messages at once": ([HELLO + packet(ATTACH)], "sent no message that is known here"),
    "too long a packet": ([HELLO, bytes(PACKET_BYTES + 1)], f"sent a packet of more than {PACKET_BYTES} bytes"),
    "too long": ([HELLO, in_memfd(2**31 - 1)], "announced a message of 2147483647 bytes; at most 1048576"),
    "no memory": ([HELLO, in_memfd(100)], "announced a message in a memfd and did not send it"),
    "expert out of range": ([*ATTACHING, packet(Demand(1, 0, pack_ids(np.array([64]))))], "no such experts"),
    "no such pool": ([*ATTACHING, packet(Hint(7, b""))], "pool 7"),
    "half an id": ([*ATTACHING, packet(Demand(1, 0, b"123"))], "multiple of element size"),
    "ticket that falls": ([*ATTACHING, packet(DEMAND), packet(DEMAND)], "ticket 1 does not rise above 1"),
}


@pytest.mark.parametrize("case", OUT_OF_ORDER)
def test_what_makes_no_sense_is_refused_by_name_and_others_go_on(served: ServedDaemon, case: str) -> None:
    packets, reason = OUT_OF_ORDER[case]
    with served.worker() as bystander:
        assert reason in refusal_of(served.path, *packets)
        assert bystander.request(DEMAND).ticket == 1
    wait_until(lambda: not served.models.attached, "all are detached")
    said = f"refused pid {os.getpid()} of user"
    wait_until(lambda: any(reason in line and said in line for line in served.lines), "it is said")


def test_a_version_of_the_future_hears_which_versions_do_not_fit(served: ServedDaemon) -> None:
    hello = packet({"type": "Hello", "version": 7, "role": "worker", "capabilities": ["telepathy"]})
    assert "speaks version 7" in refusal_of(served.path, hello)


def test_a_silent_peer_is_sent_away(served: ServedDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_moe_offload.daemon.session.PEER_SECONDS", 0.2)
    with served.worker() as bystander:
        assert "sent nothing for 0.2 s" in refusal_of(served.path)
        assert bystander.request(DEMAND).ticket == 1


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_peer_that_never_reads_answers_is_sent_away(
    served: ServedDaemon, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    """Whatever is full, others are answered all the while, and others may come in."""
    monkeypatch.setattr(transport, "PEER_SECONDS", 0.5)
    if in_memory:
        report = msgspec.structs.replace(served.server.status(), failed_threads=["x" * PACKET_BYTES])
        monkeypatch.setattr(served.server, "status", lambda: report)
    peer = RawPeer(served.path, CONTROL)
    peer.socket.settimeout(0.01)
    slowest = 0.0
    with pytest.raises(ConnectionError), served.worker() as bystander:
        for ticket in range(1, 1000):
            begun = time.monotonic()
            bystander.request(Demand(ticket, 0, b""))
            served.connect().close()
            slowest = max(slowest, time.monotonic() - begun)
            with suppress(TimeoutError):
                for _ in range(1000):
                    peer.socket.send(packet(GetStatus()))
    assert slowest < 0.4
    peer.channel.close()


def test_descriptors_nobody_asked_for_are_closed_at_once(served: ServedDaemon) -> None:
    with served.worker() as bystander:
        bystander.request(DEMAND)
        before = open_fds()
        for packets in ([HELLO], ATTACHING, [*ATTACHING, packet(Hint(0, b""))], [b"\1"], [b""], [in_memfd(100)]):
            for count in (1, 2, 100):
                peer = RawPeer(served.path, *packets[:-1])
                send_with_fd(peer.socket, packets[-1], count)
                peer.socket.shutdown(socket.SHUT_WR)
                peer.read_to_the_end()
        wait_until(lambda: open_fds() == before, "they are closed")


def test_messages_in_memory_are_believed_only_if_nobody_can_change_them(served: ServedDaemon) -> None:
    with served.worker() as bystander:
        before = open_fds()
        for seals, reply in ((ALL_SEALS, "speaks version 1"), (SIZE_SEALS, "memory that cannot be trusted")):
            peer = RawPeer(served.path)
            hello = packet(Hello(1, "worker"))
            send_memfd(peer.socket, memfd(hello, seals), len(hello))
            (refused,) = peer.read_to_the_end()
            assert isinstance(refused, Refused) and reply in refused.reason
        wait_until(lambda: open_fds() == before, "what they sent is closed")
        assert bystander.request(DEMAND).ticket == 1


def test_more_peers_than_the_house_can_hold(served: ServedDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_PEERS", 3)
    with served.worker() as first, served.worker(), served.worker():
        with pytest.raises(RefusedError, match="came while 3 others are connected"):
            served.connect()
        assert first.request(DEMAND).ticket == 1
    wait_until(lambda: not served.models.attached, "there is room again")
    with served.worker() as late:
        assert late.request(DEMAND).ticket == 1


def test_a_worker_that_is_killed_is_detached(served: ServedDaemon) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from served_daemon import ATTACH; from pathlib import Path\n"
        "from vllm_moe_offload.client.connection import Connection\n"
        "c = Connection.connect(Path(sys.argv[1]), 'worker', 10); c.request(ATTACH); print('in', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(served.path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        assert served.models.attached[0].request.pid == process.pid
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: not served.models.attached, "the dead worker is detached")


def test_a_fault_in_the_models_ends_that_connection_only(served: ServedDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda fault: faults.append(fault.exc_type))
    with served.worker() as victim, served.worker() as bystander:
        served.models.attached[0].hints = None  # type: ignore[assignment]
        victim.send(Hint(0, b""))
        with pytest.raises(DaemonGoneError):
            victim.request(DEMAND)
        assert bystander.request(DEMAND).ticket == 1
    wait_until(lambda: faults == [AttributeError], "it is seen")


def test_refusals_do_not_fill_the_log(served: ServedDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(20):
        refusal_of(served.path, b"nonsense")
    wait_until(lambda: served.server.refused == 20, "all are counted")
    assert len(served.lines) == 1
    monkeypatch.setattr(server, "COMPLAINT_SECONDS", 0.0)
    refusal_of(served.path, b"nonsense")
    wait_until(lambda: len(served.lines) == 2, "it is said")
    assert served.lines[1].endswith("(19 more since the last such line)")


def test_stop_ends_it_for_everybody(served: ServedDaemon) -> None:
    control = served.connect("control")
    with served.worker() as worker:
        control.request(Stop())
        served.thread.join(10)
        assert not served.thread.is_alive()
        assert served.reason == f"pid {os.getpid()} of user {os.geteuid()} asked for it"
        with pytest.raises(DaemonGoneError):
            worker.request(DEMAND)
        assert not served.models.attached
        with pytest.raises(DaemonGoneError, match="no daemon answers"):
            served.connect()
    control.close()


def test_it_leaves_when_the_last_engine_has(tmp_path: Path) -> None:
    with ServedDaemon(tmp_path / "socket", leave_after=0.3) as served:
        onlooker = served.connect("control")
        with served.worker(), served.worker():
            served.thread.join(0.6)
            assert served.thread.is_alive()
        served.thread.join(5)
        assert served.reason == "no engine was attached for 0.3 s"
        onlooker.close()


def test_it_leaves_when_no_engine_ever_came(tmp_path: Path) -> None:
    with ServedDaemon(tmp_path / "socket", leave_after=0.1) as served:
        served.thread.join(5)
        assert served.reason == "no engine was attached for 0.1 s"


def test_running_out_of_descriptors_is_survived(served: ServedDaemon) -> None:
    import resource

    with served.worker() as bystander, ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(waiting.close)
        highest = max(int(fd) for fd in open_fds())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        holes = []
        try:
            while True:
                holes.append(os.dup(0))
        except OSError as error:
            assert error.errno == errno.EMFILE
        for hole in holes:
            stack.callback(os.close, hole)
        waiting.connect(str(served.path))
        wait_until(lambda: any("cannot accept" in line for line in served.lines), "it is said")
        assert bystander.request(DEMAND).ticket == 1
    with served.worker() as late:
        assert late.request(DEMAND).ticket == 1
