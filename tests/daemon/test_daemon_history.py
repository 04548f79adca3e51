"""One history for all engines of a model: what comes is kept, what resembles is found, nobody spoils it for others."""

import os
import random
import socket
import subprocess
import sys
import threading
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.daemon.past import FINGERPRINT, SHAPE, WIDTH, past_request, same
from tests.daemon.served_daemon import STORE, ServedDaemon
from tests.daemon.wire import connected, packet, wait_until
from vllm_moe_offload.client.connection import Connection, DaemonGoneError, RefusedError
from vllm_moe_offload.daemon import histories as daemon_histories
from vllm_moe_offload.daemon.histories import DaemonHistories
from vllm_moe_offload.daemon.history import DaemonHistory
from vllm_moe_offload.errors import ConfigError, OffloadError, TraceError
from vllm_moe_offload.ipc.protocol import (
    VERSION,
    GetStatus,
    Hello,
    HistorySize,
    OpenHistory,
    Remember,
    Search,
)
from vllm_moe_offload.ipc.trace_codec import pack_embedding, pack_trace, unpack_trace
from vllm_moe_offload.trace import persistence
from vllm_moe_offload.trace.archive import HistoryArchive
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.trace import Trace

OPEN = OpenHistory(FINGERPRINT, SHAPE, STORE)
FUZZED_CONNECTIONS = 2000
SOMEWHERE = np.eye(WIDTH, dtype=np.float32)


def daemon_history(archive: HistoryArchive | None = None) -> DaemonHistory:
    return DaemonHistory(archive, FINGERPRINT, SHAPE)


def lengths(trace: Trace) -> list[int]:
    return np.diff(trace.offsets).tolist()


def test_the_nearest_come_first_and_the_latest_have_their_share() -> None:
    history = daemon_history()
    for number in range(12):
        history.remember(past_request(number, tokens=10 + number, axis=number % 3))
    found = history.search(SOMEWHERE[1], 100)
    assert lengths(found) == [11, 14, 17, 20, 10, 12, 16], "the nearest within nine tenths, then the latest"
    assert same(found.request(0), past_request(1, tokens=11, axis=1))
    assert lengths(history.search(None, 30)) == [21, 9]
    assert lengths(history.search(SOMEWHERE[1], 0)) == lengths(history.search(None, -5)) == []
    assert sum(lengths(history.search(SOMEWHERE[0], 1 << 60))) == history.size.tokens


@given(st.integers(0, 200), st.integers(0, WIDTH), st.lists(st.integers(1, 30), max_size=8))
def test_a_search_brings_each_request_once_and_as_much_as_was_asked_for(
    most: int, axis: int, tokens: list[int]
) -> None:
    history = daemon_history()
    past = [past_request(seed, count) for seed, count in enumerate(tokens)]
    for request in past:
        history.remember(request)
    found = history.search(SOMEWHERE[axis] if axis < WIDTH else None, most)
    assert found.num_tokens == min(most, sum(tokens))
    beginnings = [
        next(seed for seed, whole in enumerate(past) if np.array_equal(whole.experts[: one.num_tokens], one.experts))
        for one in found.requests()
        if one.num_tokens > 1
    ]
    assert len(beginnings) == len(set(beginnings))


def test_what_a_daemon_may_have_already_is_kept_once() -> None:
    history = daemon_history()
    history.remember(past_request(1))
    history.remember(past_request(1), maybe_duplicate=True)
    assert history.size == HistorySize(1, 5)
    history.remember(past_request(2), maybe_duplicate=True)
    history.remember(past_request(2))
    assert history.size == HistorySize(3, 15), "twice the same request is two requests"


def test_a_request_that_knows_less_does_not_make_the_others_forget() -> None:
    history = daemon_history()
    history.remember(past_request(1, axis=2))
    history.remember(replace(past_request(2), tokens=None, phase=None, embeddings=None))
    found = history.search(SOMEWHERE[2], 10)
    assert same(found.request(0), past_request(1, axis=2))
    assert found.tokens is not None and found.embeddings is not None
    assert found.tokens[5:].tolist() == [-1] * 5 and not found.embeddings[1].any()
    with pytest.raises(ValueError, match="an embedding of 3 numbers among such of 6"):
        history.remember(replace(past_request(3), embeddings=np.zeros((1, 3), np.float16)))
    with pytest.raises(ValueError, match="embedding sought has 5 numbers"):
        history.search(np.zeros(5, np.float32), 10)
    with pytest.raises(ValueError, match="2 requests at once"):
        history.remember(replace(past_request(1), offsets=np.array([0, 2, 5])))


def test_it_is_found_again_and_engines_without_a_daemon_find_it(tmp_path: Path) -> None:
    archive = HistoryArchive(tmp_path)
    history = daemon_history(archive)
    for seed in range(3):
        history.remember(past_request(seed))
    history.save(at_once=True)
    alone, problem = archive.load(FINGERPRINT, SHAPE)
    assert problem is None and same(alone.to_trace(), daemon_history(archive).search(None, 1000).select([2, 1, 0]))


def test_a_peer_with_another_shape_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    store = HistoryStore(SHAPE)
    store.add(past_request(1))
    path = HistoryArchive(tmp_path).save(FINGERPRINT, store)
    histories = DaemonHistories(tmp_path)
    for shape in ((5, 8, 2), (4, 9, 2), (4, 8, 1)):
        with pytest.raises(TraceError, match=r"holds maps of shape \(4, 8, 2\)"):
            histories.open(OpenHistory(FINGERPRINT, shape, STORE))
    assert histories.open(OPEN).size.requests == 1
    with pytest.raises(OffloadError, match="holds maps of shape"):
        histories.open(OpenHistory(FINGERPRINT, (5, 8, 2), STORE))
    histories.close()
    assert path.exists() and not list(path.parent.glob("*.unusable-*"))


def test_a_damaged_file_is_set_aside_and_named(tmp_path: Path, said: list[str]) -> None:
    path = HistoryArchive(tmp_path).path(FINGERPRINT)
    path.parent.mkdir()
    path.write_bytes(b"nonsense")
    histories = DaemonHistories(tmp_path)
    assert histories.open(OPEN).size.requests == 0
    histories.close()
    assert "the history starts empty" in said[0] and str(path) in said[0]
    assert len(list(path.parent.glob("history.npz.unusable-*"))) == 1


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "AB" * 16, "ab" * 16 + "\n", "ab" * 15, "", "é" * 32])
def test_a_name_that_is_no_fingerprint_leads_nowhere(tmp_path: Path, name: str) -> None:
    histories = DaemonHistories(tmp_path / "kept")
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        histories.open(OpenHistory(name, SHAPE, STORE))
    histories.close()
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


@pytest.mark.parametrize("shape", [(0, 8, 2), (-4, 8, 2), (4, 8, 0), (4, 8, 9), (2000, 8, 2), (4, 1 << 20, 2)])
def test_a_shape_that_no_model_has_is_refused(shape: tuple[int, int, int]) -> None:
    histories = DaemonHistories(None)
    with pytest.raises(ValueError, match="no model has the shape"):
        histories.open(OpenHistory(FINGERPRINT, shape, STORE))
    histories.close()


def test_histories_in_use_stay_and_others_make_room(tmp_path: Path) -> None:
    histories = DaemonHistories(tmp_path)
    names = [f"{number:032x}" for number in range(daemon_histories.MOST_HISTORIES + 1)]
    opened = [histories.open(OpenHistory(name, SHAPE, name)) for name in names[:-1]]
    opened[3].remember(past_request(1))
    with pytest.raises(OffloadError, match="histories of 16 models are in use"):
        histories.open(OpenHistory(names[-1], SHAPE, STORE))
    histories.leave(opened[3])
    histories.open(OpenHistory(names[-1], SHAPE, STORE))
    assert HistoryArchive(tmp_path).read(names[3]).num_requests == 1, "saved when it made room"
    histories.close()


def test_all_histories_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that nobody uses go first, saved; then the largest of the others forgets what it would forget anyway."""
    request = past_request(1)
    monkeypatch.setattr(daemon_histories, "MOST_BYTES", 10 * sum(map(np.size, (request.experts, request.weights))) * 2)
    histories = DaemonHistories(tmp_path)
    names = [f"{number:032x}" for number in range(3)]
    first, second = (histories.open(OpenHistory(name, SHAPE, name)) for name in names[:2])
    for seed in range(3):
        first.remember(past_request(seed))
    histories.leave(first)
    for seed in range(40):
        second.remember(past_request(seed))
        histories.keep_within_bounds()
        assert sum(history.nbytes for history in histories._histories.values()) <= daemon_histories.MOST_BYTES
    assert list(histories._histories.values()) == [second] and 3 < second.size.requests < 40
    assert HistoryArchive(tmp_path).read(names[0]).num_requests == 3, "saved before it went"
    assert histories.open(OpenHistory(names[0], SHAPE, names[0])).size.requests == 3
    assert sum(history.nbytes for history in histories._histories.values()) <= daemon_histories.MOST_BYTES
    histories.close()


def test_a_history_that_cannot_be_saved_makes_no_room(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = DaemonHistories(tmp_path / "kept")
    history = histories.open(OPEN)
    history.remember(past_request(1))
    histories.leave(history)
    (tmp_path / "kept" / FINGERPRINT).touch()  # a file where a folder must be
    monkeypatch.setattr(daemon_histories, "MOST_HISTORIES", 1)
    with pytest.raises(OffloadError, match="as many as are kept"):
        histories.open(OpenHistory("cd" * 16, SHAPE, STORE))
    assert "cannot be saved" in said[0] and histories.open(OPEN).size.requests == 1
    (tmp_path / "kept" / FINGERPRINT).unlink()
    histories.close()
    assert HistoryArchive(tmp_path / "kept").read(FINGERPRINT).num_requests == 1


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--history .*file/history.*or 'off'"):
        DaemonHistories(tmp_path / "file" / "history")


def test_a_full_disk_is_said_once_and_nothing_is_lost(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_histories, "SECONDS_BETWEEN_ROUNDS", 0.01)
    monkeypatch.setattr(persistence, "SECONDS_BETWEEN_SAVES", 0)
    histories = DaemonHistories(tmp_path / "kept")
    history = histories.open(OPEN)
    (tmp_path / "kept" / FINGERPRINT).touch()  # a file where a folder must be
    history.remember(past_request(1))
    wait_until(lambda: bool(said), "it has complained")
    tries = threading.Event()
    monkeypatch.setattr(history, "save", lambda at_once=False, save=history.save: (tries.set(), save(at_once)))
    assert tries.wait(10)
    assert len(said) == 1 and "cannot be saved" in said[0]
    (tmp_path / "kept" / FINGERPRINT).unlink()
    wait_until(HistoryArchive(tmp_path / "kept").path(FINGERPRINT).exists, "it is saved")
    histories.close()


# Over a socket


def opened(served: ServedDaemon) -> Connection:
    connection = served.connect("history")
    connection.request(OPEN)
    return connection


def test_two_engines_feed_one_history(tmp_path: Path) -> None:
    with (
        ServedDaemon(tmp_path / "socket", history=tmp_path / "kept") as served,
        closing(served.connect("history")) as first,
        closing(opened(served)) as second,
    ):
        reply = first.request(OPEN)
        assert reply.folder == str(tmp_path / "kept" / FINGERPRINT) and reply.size == HistorySize(0, 0)
        first.request(Remember(pack_trace(past_request(1, axis=4))))
        assert second.request(Remember(pack_trace(past_request(2, 7, axis=5)))).size == HistorySize(2, 12)
        found = second.request(Search(pack_embedding(SOMEWHERE[4]), 5))
        assert same(unpack_trace(found.trace, SHAPE), past_request(1, axis=4))
        (model,) = [*served.connect("control").request(GetStatus()).models]
        assert (model.stats["history_requests"], model.stats["history_tokens"]) == (2, 12)
    assert HistoryArchive(tmp_path / "kept").read(FINGERPRINT).num_requests == 2


def test_a_bad_trace_costs_only_its_sender(tmp_path: Path) -> None:
    with ServedDaemon(tmp_path / "socket") as served, closing(opened(served)) as bystander:
        bystander.request(Remember(pack_trace(past_request(1))))
        good = pack_trace(past_request(2))
        bad = msgspec.structs.replace(good, experts=b"\xff" * len(good.experts))
        with closing(opened(served)) as liar:
            with pytest.raises(RefusedError, match="names expert 255, but 'num_experts' is 8"):
                liar.request(Remember(bad))
            with pytest.raises(DaemonGoneError):
                liar.request(Remember(good))
        assert bystander.request(Remember(good)).size == HistorySize(2, 10)
        wait_until(lambda: any("names expert 255" in line for line in served.lines), "it is said")


@pytest.mark.parametrize(
    ("role", "messages", "reason"),
    [
        ("history", [Remember(pack_trace(past_request(1)))], "sent Remember before OpenHistory"),
        ("history", [Search(b"", 1)], "sent Search before OpenHistory"),
        ("history", [OPEN, OPEN], "sent OpenHistory a second time"),
        ("history", [OPEN, Search(b"123", 1)], "multiple of element size"),
        ("history", [OPEN, GetStatus()], "sent GetStatus on a connection for OpenHistory, Remember, Search"),
        ("worker", [OPEN], "sent OpenHistory on a connection for Attach"),
        ("history", [msgspec.structs.replace(OPEN, fingerprint="../x")], "32 hexadecimal digits"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path: Path, role: str, messages: list, reason: str) -> None:
    with ServedDaemon(tmp_path / "socket") as served, closing(served.connect(role)) as peer:
        for message in messages[:-1]:
            peer.request(message)
        with pytest.raises(RefusedError, match=reason):
            peer.request(messages[-1])


def test_long_requests_travel_on_a_history_connection_only(tmp_path: Path) -> None:
    long = pack_trace(past_request(1, tokens=200_000))
    assert len(msgspec.msgpack.encode(long)) > 4 << 20
    with ServedDaemon(tmp_path / "socket") as served, closing(opened(served)) as engine:
        assert engine.request(Remember(long)).size.tokens == 200_000
        found = unpack_trace(engine.request(Search(b"", 1 << 40)).trace, SHAPE)
        assert same(found, past_request(1, tokens=200_000))
        with closing(served.connect()) as worker, pytest.raises(ValueError, match="at most 1048576 can be sent"):
            worker.request(Remember(long))


def test_many_engines_at_once(tmp_path: Path) -> None:
    with ServedDaemon(tmp_path / "socket", history=tmp_path / "kept") as served:

        def serve(engine: int) -> None:
            with closing(opened(served)) as connection:
                for number in range(20):
                    kept = connection.request(Remember(pack_trace(past_request(engine * 100 + number)))).size.tokens
                    found = connection.request(Search(pack_embedding(SOMEWHERE[number % WIDTH]), 50))
                    # others' requests may come between the search and its answer
                    assert min(50, kept) <= unpack_trace(found.trace, SHAPE).num_tokens <= min(50, found.size.tokens)

        engines = [threading.Thread(target=serve, args=(engine,)) for engine in range(6)]
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.join(60)
        with closing(opened(served)) as last:
            assert last.request(Search(b"", 0)).size == HistorySize(120, 600)
    assert HistoryArchive(tmp_path / "kept").read(FINGERPRINT).num_requests == 120


def test_a_kill_loses_no_more_than_what_was_not_saved(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from history_daemon import serve; serve(sys.argv[2], sys.argv[3], 0.05)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "socket"), str(tmp_path / "kept")]
    kept = HistoryArchive(tmp_path / "kept")
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        assert process.stdout is not None and process.stdout.readline() == b"serving\n"
        with closing(Connection.connect(tmp_path / "socket", "history", 10)) as engine:
            engine.request(OPEN)
            for seed in range(5):
                engine.request(Remember(pack_trace(past_request(seed))))
            wait_until(lambda: (kept.outline(FINGERPRINT) or (0,))[0] == 25, "it is saved")
        process.kill()
    assert same(kept.read(FINGERPRINT).request(4), past_request(4))


def test_messages_of_any_kind_cost_only_their_sender(tmp_path: Path) -> None:
    """Sound messages with a few bytes changed, cut or doubled; meanwhile an engine is served."""
    draw = random.Random(1)
    told_and_asked = (Remember(pack_trace(past_request(1))), Search(b"", 9))
    sound = [packet(one) for one in (Hello(VERSION, "history"), OPEN, *told_and_asked)]
    with ServedDaemon(tmp_path / "socket") as served, closing(opened(served)) as bystander:
        told = 0
        for number in range(FUZZED_CONNECTIONS):
            with connected(served.path) as peer, suppress(ConnectionError):
                for data in [*sound[:2], *draw.choices(sound[2:], k=3)]:
                    peer.send(spoilt(draw, data) if draw.random() < 0.4 else data)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(65536):
                    pass
            if number % 50 == 0:
                told += 1
                assert bystander.request(Remember(pack_trace(past_request(told)))).size.requests >= told
        history = served.histories.open(OPEN)
        history._history.check_integrity()
        assert unpack_trace(bystander.request(Search(b"", 100)).trace, SHAPE).num_tokens == 100
        wait_until(lambda: len(served.lines) > 0, "refusals are said")


def spoilt(draw: random.Random, data: bytes) -> bytes:
    place, kind = draw.randrange(len(data)), draw.randrange(4)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + data
    changed = bytearray(data)
    for _ in range(kind):
        changed[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(changed)
