"""More than 100,000 messages, few of them what they should be, at a live daemon: it never falls, leaks or hangs."""

import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
from house import ATTACH, EXPERTS, STORE, House
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import NULL, frame, open_fds, threads, wait_until

from vllm_moe_offload.daemon.framing import FramedSocket, PeerError
from vllm_moe_offload.daemon.protocol import (
    Adopt,
    Attach,
    Demand,
    GetStatus,
    Hello,
    Hint,
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

RAW_CONNECTIONS = 16_000
RAW_MESSAGES = 100_000
EXAMPLES = 400
BYSTANDER_EVERY = 200

SHAPE = (2, 8, 1)
TRACE = PackedTrace(lengths=b"\3\0\0\0", experts=bytes(6), weights=bytes(12))
"""A request of three tokens."""

Parcel = tuple[bytes, int]
"""Bytes, and how many descriptors come with them."""


class Arena:
    """A daemon under fire, an engine that wants to be served meanwhile, and what the daemon has received."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.ticket = 0
        self.received = 0
        self.faults: list[object] = []
        self._engine = house.worker()
        self.engine = self._engine.__enter__()
        self._null = NULL.open()

    def throw(self, parcels: list[Parcel]) -> bytes:
        """Send all that on a new connection and hang up; what the daemon answered."""
        peer = socket.socket(socket.AF_UNIX)
        answers = []
        with peer, suppress(ConnectionError):
            peer.settimeout(20)
            peer.connect(str(self.house.path))
            for data, fds in parcels:
                if fds:
                    socket.send_fds(peer, [data], [self._null.fileno()] * fds)
                else:
                    peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            while answer := peer.recv(65536):
                answers.append(answer)
        return b"".join(answers)

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
    with House(tmp_path / "socket") as house:
        monkeypatch.setattr(house.server, "stop", lambda reason: None)
        attacked = Arena(house)
        calm = threads()
        monkeypatch.setattr(FramedSocket, "receive", _counted(attacked, FramedSocket.receive))
        monkeypatch.setattr(threading, "excepthook", attacked.faults.append)
        yield attacked
        attacked.still_serves()
        wait_until(lambda: len(house.models.attached) == 1, "all but the engine are detached")
        wait_until(lambda: threads() == calm, "nobody's thread but the house's and the engine's are left")
        attacked.close()
        with house.worker():
            assert len(house.models.attached) >= 1
        monkeypatch.undo()
    assert attacked.faults == []
    wait_until(lambda: threads() == running, "all threads are gone")
    assert open_fds() == before


def _counted(arena: Arena, receive: Callable[..., Request | None]) -> Callable[..., Request | None]:
    """``receive``, counting what the daemon's threads understand or refuse."""

    def counting(frames: FramedSocket[Request]) -> Request | None:
        if threading.current_thread() is threading.main_thread():
            return receive(frames)
        try:
            message = receive(frames)
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
    st.builds(Hello, st.one_of(st.just(1), ANY_INT), st.one_of(st.sampled_from(["worker", "control"]), TEXT)),
    st.builds(Attach, st.one_of(st.just(STORE), TEXT), ANY_INT, ANY_INT, st.booleans(), TEXT, ANY_INT),
    st.builds(Demand, st.one_of(st.integers(1, 50), ANY_INT), POOL, IDS, st.booleans()),
    st.builds(Hint, POOL, IDS, st.booleans()),
    st.builds(Adopt, POOL, IDS, IDS),
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


PARCELS = st.tuples(
    st.one_of(
        MESSAGES.map(frame),
        st.builds(edited, MESSAGES.map(frame), EDITS),
        st.one_of(NEARLY, ANYTHING).map(lambda value: frame(msgspec.msgpack.encode(value))),
        st.binary(max_size=60),
    ),
    st.sampled_from([0, 0, 0, 0, 0, 0, 1, 2]),
).filter(lambda parcel: bool(parcel[0]))
RECALLING = frame(Hello(1, "history")) + frame(OpenHistory(STORE, SHAPE, STORE)) + frame(Remember(TRACE))
OPENINGS = st.sampled_from(
    [[], [(frame(Hello(1, "control")), 0)], [(frame(Hello(1, "worker")), 0), (frame(ATTACH), 0)], [(RECALLING, 0)]]
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
    def attack(opening: list[Parcel], parcels: list[Parcel]) -> None:
        answers = arena.throw(opening + parcels)
        assert all(isinstance(answer, msgspec.Struct) for answer in replies_in(answers))
        arena.still_serves()

    attack()
    assert arena.received > EXAMPLES


def replies_in(data: bytes) -> list[Reply]:
    """What the daemon said, which must be whole messages, except that a connection may end within one."""
    decoder = msgspec.msgpack.Decoder(Reply)
    replies = []
    while len(data) >= 4 and len(data) >= 4 + struct.unpack_from("<I", data)[0]:
        (length,) = struct.unpack_from("<I", data)
        replies.append(decoder.decode(data[4 : 4 + length]))
        data = data[4 + length :]
    return replies


# --- fast: a great many, sensible ones with senseless ones among them ---


def test_a_hundred_thousand_messages(arena: Arena) -> None:
    draw = random.Random(1)
    for number in range(RAW_CONNECTIONS):
        arena.throw(conversation(draw))
        if number % BYSTANDER_EVERY == 0:
            arena.still_serves()
    assert arena.received >= RAW_MESSAGES
    assert arena.house.models.attach_count > RAW_CONNECTIONS / 4
    assert arena.house.server.refused > RAW_CONNECTIONS / 2


def conversation(draw: random.Random) -> list[Parcel]:
    """An engine's or a person's, until it goes astray; or one that is astray from the start."""
    parcels: list[Parcel] = []
    start = draw.random()
    if start < 0.7:
        sensible = [frame(Hello(1, "worker")), frame(ATTACH), *(work(draw, t) for t in range(1, draw.randint(2, 18)))]
        parcels.append((b"".join(sensible), 0))
    elif start < 0.75:
        parcels.append((RECALLING + frame(Search(b"", draw.getrandbits(16))) * draw.randint(0, 3), 0))
    elif start < 0.85:
        parcels.append((frame(Hello(1, "control")) + frame(GetStatus()) * draw.randint(0, 3), 0))
    if draw.random() < 0.9:
        parcels.append((nonsense(draw), draw.choice((0, 0, 0, 0, 1, 2, 250))))
    return parcels


def work(draw: random.Random, ticket: int) -> bytes:
    ids = pack_ids(np.array(draw.sample(range(EXPERTS), draw.randint(0, 12))))
    return frame(Demand(ticket, 0, ids) if draw.random() < 0.5 else Hint(0, ids, draw.random() < 0.5))


def nonsense(draw: random.Random) -> bytes:
    message = draw.choice((HELLO, DEMAND, HINT, ADOPT, ATTACH_FRAME, STATUS, STOP, REMEMBER, SEARCH))
    kind = draw.randrange(8)
    if kind == 0:
        return message
    if kind == 1:
        return draw.randbytes(draw.randint(1, 64))
    if kind == 2:
        return frame(draw.randbytes(draw.randint(0, 64)))
    if kind == 3:
        return message[: draw.randint(1, len(message))]
    if kind == 4:
        return struct.pack("<I", draw.getrandbits(32)) + message[4:]
    if kind == 5:
        return frame(draw.choice((b"\x91", b"\x81\xa1x", b"\xc7", b"\xdf\xff\xff\xff\xff")) * draw.randint(1, 3000))
    cut = draw.randint(4, len(message))
    if kind == 6:
        return frame(message[4:cut] + draw.choice((DEMAND, HINT, ADOPT))[draw.randint(4, 20) :])
    flipped = bytearray(message)
    for _ in range(draw.randint(1, 4)):
        flipped[draw.randrange(4, len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


HELLO, STATUS, STOP, ATTACH_FRAME = frame(Hello(1, "worker")), frame(GetStatus()), frame(Stop()), frame(ATTACH)
DEMAND, HINT = frame(Demand(1000, 0, bytes(range(32)))), frame(Hint(0, bytes(32)))
ADOPT = frame(Adopt(0, bytes(4), bytes(4)))
REMEMBER, SEARCH = frame(Remember(TRACE)), frame(Search(bytes(8), 1000))


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=80), MESSAGES.map(frame)), max_size=5).map(b"".join))
def test_an_engine_takes_no_harm_from_a_daemon_that_talks_nonsense(data: bytes) -> None:
    theirs, ours = socket.socketpair()
    frames = FramedSocket(ours, msgspec.msgpack.Decoder(Reply), 4)
    theirs.sendall(data)
    theirs.close()
    try:
        while (reply := frames.receive()) is not None:
            assert isinstance(reply, msgspec.Struct)
    except PeerError as error:
        assert str(error)
    finally:
        frames.close()
