"""More than 100,000 messages, few of them what they should be, at a live daemon: it never falls, leaks or hangs."""

import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.daemon.served_daemon import ATTACH, EXPERTS, STORE, ServedDaemon
from tests.daemon.wire import ALL_SEALS, NULL, connected, in_memfd, memfd, open_fds, packet, pair, threads, wait_until
from vllm_moe_offload.ipc.protocol import (
    VERSION,
    Attach,
    Demand,
    GetStatus,
    Hello,
    Hint,
    ImportSlots,
    Message,
    OpenHistory,
    PackedTrace,
    Remember,
    Reply,
    Request,
    Search,
    Stop,
    pack_ids,
)
from vllm_moe_offload.ipc.transport import PACKET_BYTES, Channel, PeerError

RAW_CONNECTIONS = 16_000
RAW_MESSAGES = 100_000
EXAMPLES = 400
BYSTANDER_EVERY = 200

SHAPE = (2, 8, 1)
TRACE = PackedTrace(lengths=b"\3\0\0\0", experts=bytes(6), weights=bytes(12))
"""A request of three tokens."""


class Parcel(NamedTuple):
    """A packet and what comes with it."""

    data: bytes
    fds: int = 0
    memory: bytes | None = None
    """Content of a memfd that comes last."""
    seals: int = ALL_SEALS


def in_memory(content: bytes, length: int | None = None, fds: int = 0, seals: int = ALL_SEALS) -> Parcel:
    """A message in a memfd, announced with ``length`` bytes."""
    return Parcel(in_memfd(len(content) if length is None else length), fds, content, seals)


class Arena:
    """A daemon under fire, an engine that wants to be served meanwhile, and what the daemon has received."""

    def __init__(self, served: ServedDaemon) -> None:
        self.served = served
        self.ticket = 0
        self.received = 0
        self.faults: list[object] = []
        self._engine = served.worker()
        self.engine = self._engine.__enter__()
        self._null = NULL.open()

    def throw(self, parcels: list[Parcel]) -> list[bytes]:
        """Send all that on a new connection and hang up; what the daemon answered."""
        answers = []
        with connected(self.served.path) as peer:
            peer.settimeout(20)
            with suppress(ConnectionError):
                for parcel in parcels:
                    self._send(peer, parcel)
            peer.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                while answer := peer.recv(PACKET_BYTES):
                    answers.append(answer)
        return answers

    def _send(self, peer: socket.socket, parcel: Parcel) -> None:
        fds = [self._null.fileno()] * parcel.fds
        if parcel.memory is None:
            socket.send_fds(peer, [parcel.data], fds)
            return
        fd = memfd(parcel.memory, parcel.seals)
        try:
            socket.send_fds(peer, [parcel.data], [*fds, fd])
        finally:
            os.close(fd)

    def still_serves(self) -> None:
        self.ticket += 1
        wanted = pack_ids(np.random.default_rng(self.ticket).permutation(EXPERTS)[:8])
        assert self.engine.request(Demand(self.ticket, 0, wanted)).slots == wanted

    def close(self) -> None:
        self._engine.__exit__(None, None, None)
        self._null.close()


@pytest.fixture
def arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    before, running = open_fds(), threads()
    with ServedDaemon(tmp_path / "socket") as served:
        monkeypatch.setattr(served.server, "stop", lambda reason: None)
        attacked = Arena(served)
        calm = threads()
        monkeypatch.setattr(Channel, "receive", _counted(attacked, Channel.receive))
        monkeypatch.setattr(threading, "excepthook", attacked.faults.append)
        yield attacked
        attacked.still_serves()
        wait_until(lambda: len(served.models.attached) == 1, "all but the engine are detached")
        wait_until(lambda: threads() == calm, "nobody's thread but the served's and the engine's are left")
        attacked.close()
        with served.worker():
            assert len(served.models.attached) >= 1
        monkeypatch.undo()
    assert attacked.faults == []
    wait_until(lambda: threads() == running, "all threads are gone")
    assert open_fds() == before


def _counted(arena: Arena, receive: Callable[..., Request | None]) -> Callable[..., Request | None]:
    """``receive``, counting what the daemon's threads understand or refuse."""

    def counting(channel: Channel[Request]) -> Request | None:
        if threading.current_thread() is threading.main_thread():
            return receive(channel)
        try:
            message = receive(channel)
        except PeerError:
            arena.received += 1
            raise
        arena.received += message is not None
        return message

    return counting


# --- generated: every message with any content, out of any order, and its bytes edited ---

ANY_INT = st.integers(-(2**63), 2**64 - 1)
IDS = st.one_of(
    st.lists(st.integers(0, EXPERTS - 1), max_size=9, unique=True).map(lambda ids: pack_ids(np.array(ids, np.int32))),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9).map(lambda ids: pack_ids(np.array(ids))),
    st.binary(max_size=40),
)
POOL = st.one_of(st.just(0), ANY_INT)
TEXT = st.text(max_size=20)
FINGERPRINT = st.one_of(st.just(STORE), st.sampled_from([digit * 32 for digit in "0123456789abcdeg/"]), TEXT)
TRACES = st.one_of(st.just(TRACE), st.builds(PackedTrace, *[st.one_of(st.binary(max_size=24), st.just(bytes(4)))] * 6))
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Hello, st.one_of(st.just(VERSION), ANY_INT), st.one_of(st.sampled_from(["worker", "control"]), TEXT)),
    st.builds(Attach, st.one_of(st.just(STORE), TEXT), ANY_INT, ANY_INT, st.booleans(), TEXT, ANY_INT),
    st.builds(Demand, st.one_of(st.integers(1, 50), ANY_INT), POOL, IDS, st.booleans()),
    st.builds(Hint, POOL, IDS, st.booleans()),
    st.builds(ImportSlots, POOL, IDS, IDS),
    st.builds(OpenHistory, FINGERPRINT, st.one_of(st.just(SHAPE), st.tuples(ANY_INT, ANY_INT, ANY_INT)), TEXT),
    st.builds(Remember, TRACES, st.booleans()),
    st.builds(Search, st.one_of(st.just(bytes(8)), st.binary(max_size=16)), ANY_INT),
    st.builds(GetStatus),
    st.builds(Stop),
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), ANY_INT, st.floats(), TEXT, st.binary(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=8,
)
NEARLY = st.builds(
    lambda kind, fields: {"type": kind, **fields},
    st.one_of(st.sampled_from([kind.__name__ for kind in Request.__args__]), TEXT),  # type: ignore[attr-defined]
    st.dictionaries(st.sampled_from(["version", "role", "store", "ticket", "pool", "experts", "slots", "x"]), ANYTHING),
)
EDITS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255), st.sampled_from("rid")), max_size=4)


def edited(data: bytes, edits: list[tuple[int, int, str]]) -> bytes:
    """With bytes replaced, inserted and deleted."""
    result = bytearray(data)
    for position, value, how in edits:
        at = position % (len(result) + 1)
        if how == "i":
            result.insert(at, value)
        elif at < len(result):
            if how == "r":
                result[at] = value
            else:
                del result[at]
    return bytes(result)


PAYLOADS = st.one_of(
    MESSAGES.map(packet),
    st.builds(edited, MESSAGES.map(packet), EDITS),
    st.one_of(NEARLY, ANYTHING).map(packet),
    st.binary(max_size=60),
)
FDS = st.sampled_from([0, 0, 0, 0, 0, 0, 1, 2])
PARCELS = st.one_of(
    st.tuples(PAYLOADS, FDS).map(lambda pair: Parcel(*pair)),
    st.builds(in_memory, PAYLOADS, st.just(None), FDS),
    st.builds(in_memory, PAYLOADS, st.one_of(st.none(), st.integers(0, 2**32 - 1)), FDS, st.integers(0, ALL_SEALS)),
)
RECALLING = [packet(each) for each in (Hello(VERSION, "history"), OpenHistory(STORE, SHAPE, STORE), Remember(TRACE))]
OPENINGS = st.sampled_from(
    [[], [packet(Hello(VERSION, "control"))], [packet(Hello(VERSION, "worker")), packet(ATTACH)], RECALLING]
)
ENOUGH = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def test_any_sequence_of_messages_and_near_messages(arena: Arena) -> None:
    @ENOUGH
    @given(OPENINGS, st.lists(PARCELS, max_size=12))
    def attack(opening: list[bytes], parcels: list[Parcel]) -> None:
        decoder = msgspec.msgpack.Decoder(Reply)
        for answer in arena.throw([*map(Parcel, opening), *parcels]):
            assert isinstance(decoder.decode(answer), msgspec.Struct), "whole messages"
        arena.still_serves()

    attack()
    assert arena.received > EXAMPLES


# --- fast: a great many, sensible ones with senseless ones among them ---


def test_a_hundred_thousand_messages(arena: Arena) -> None:
    draw = random.Random(1)
    for number in range(RAW_CONNECTIONS):
        arena.throw(conversation(draw))
        if number % BYSTANDER_EVERY == 0:
            arena.still_serves()
    assert arena.received >= RAW_MESSAGES
    assert arena.served.models.attach_count > RAW_CONNECTIONS / 4
    assert arena.served.server.refused > RAW_CONNECTIONS / 2


def conversation(draw: random.Random) -> list[Parcel]:
    """An engine's or a person's, until it goes astray; or one that is astray from the start."""
    packets: list[bytes] = []
    start = draw.random()
    if start < 0.7:
        packets = [HELLO, ATTACHING, *(work(draw, ticket) for ticket in range(1, draw.randint(2, 18)))]
    elif start < 0.75:
        packets = [*RECALLING, *[packet(Search(b"", draw.getrandbits(16)))] * draw.randint(0, 3)]
    elif start < 0.85:
        packets = [packet(Hello(VERSION, "control")), *[STATUS] * draw.randint(0, 3)]
    parcels = [Parcel(data) if draw.random() < 0.95 else in_memory(data) for data in packets]
    if draw.random() < 0.9:
        parcels.append(nonsense(draw))
    return parcels


def work(draw: random.Random, ticket: int) -> bytes:
    ids = pack_ids(np.array(draw.sample(range(EXPERTS), draw.randint(0, 12))))
    return packet(Demand(ticket, 0, ids) if draw.random() < 0.5 else Hint(0, ids, draw.random() < 0.5))


def nonsense(draw: random.Random) -> Parcel:
    """A packet, as a rule one that is none; or a message in memory that is not what it was announced as."""
    data, fds = senseless(draw), draw.choice((0, 0, 0, 0, 1, 2, 250))
    kind = draw.randrange(6)
    if kind == 0:
        return in_memory(data, fds=min(fds, 2))
    if kind == 1:
        return in_memory(data, draw.choice((0, len(data) + 1, max(0, len(data) - 1), draw.getrandbits(32))))
    if kind == 2:
        return in_memory(data, seals=draw.randrange(ALL_SEALS))
    return Parcel(data, fds)


def senseless(draw: random.Random) -> bytes:
    message = draw.choice((HELLO, DEMAND, HINT, IMPORT, ATTACHING, STATUS, STOP, REMEMBER, SEARCH))
    kind = draw.randrange(9)
    if kind == 0:
        return message
    if kind == 1:
        return draw.randbytes(draw.randint(0, 64))
    if kind == 2:
        return in_memfd(draw.getrandbits(32))[: draw.randint(1, 5)]
    if kind == 3:
        return message[: draw.randint(0, len(message))]
    if kind == 4:
        return bytes(PACKET_BYTES + draw.randint(-1, 1))
    if kind == 5:
        return draw.choice((b"\x91", b"\x81\xa1x", b"\xc7", b"\xdf\xff\xff\xff\xff")) * draw.randint(1, 3000)
    cut = draw.randint(0, len(message))
    if kind == 6:
        return message[:cut] + draw.choice((DEMAND, HINT, IMPORT))[draw.randint(0, 16) :]
    if kind == 7:
        return message * draw.randint(2, 5)
    flipped = bytearray(message)
    for _ in range(draw.randint(1, 4)):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


HELLO, STATUS, STOP, ATTACHING = packet(Hello(VERSION, "worker")), packet(GetStatus()), packet(Stop()), packet(ATTACH)
DEMAND, HINT = packet(Demand(1000, 0, bytes(range(32)))), packet(Hint(0, bytes(32)))
IMPORT = packet(ImportSlots(0, bytes(4), bytes(4)))
REMEMBER, SEARCH = packet(Remember(TRACE)), packet(Search(bytes(8), 1000))


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=80), MESSAGES.map(packet)), max_size=5))
def test_an_engine_takes_no_harm_from_a_daemon_that_talks_nonsense(packets: list[bytes]) -> None:
    theirs, ours = pair()
    channel: Channel[Reply] = Channel(ours, msgspec.msgpack.Decoder(Reply), 4)
    for data in packets:
        theirs.send(data)
    theirs.close()
    refused = 0
    while refused < len(packets):
        try:
            reply = channel.receive()
        except PeerError as error:
            assert str(error)
            refused += 1
            continue
        if reply is None:
            break
        assert isinstance(reply, msgspec.Struct)
    channel.close()
