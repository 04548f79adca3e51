"""An engine's side of the shared history: others' requests through the daemon, and on without it when that dies."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.daemon.past import FINGERPRINT, SHAPE, past_request, same
from tests.daemon.served_daemon import STORE, ServedDaemon
from tests.daemon.wire import threads, wait_until
from tests.log_lines import LogLines
from vllm_moe_offload.client import history_client
from vllm_moe_offload.client.remote_history import SharedHistory
from vllm_moe_offload.ipc.protocol import OpenHistory
from vllm_moe_offload.predict.base import ModelShape
from vllm_moe_offload.predict.history import HistoryPredictor
from vllm_moe_offload.predict.registry import predictor_for_engine
from vllm_moe_offload.trace.archive import HistoryArchive
from vllm_moe_offload.trace.history import PastRequest
from vllm_moe_offload.trace.trace_file import read_trace

OPEN = OpenHistory(FINGERPRINT, SHAPE, STORE)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(history_client, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(history_client, "QUIET_SECONDS", 0.05)
    before = threads()
    yield
    wait_until(lambda: threads() <= before, "no thread is left")


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the engine's side logs."""
    log = LogLines(within=".history_")
    yield log.attach()
    log.detach()


def engine(socket: Path, tells: bool = True) -> SharedHistory:
    return SharedHistory(socket, OPEN, 1000, tells)


class Seeker:
    """Collects the answers to one question."""

    def __init__(self, kept: SharedHistory, axis: int | None = None):
        self.answers: list[list[PastRequest]] = []
        self.threads: list[threading.Thread] = []
        embedding = None if axis is None else np.eye(6, dtype=np.float32)[axis]
        kept.history.seek(embedding, 256, self._hear)

    def _hear(self, found: list[PastRequest]) -> None:
        self.answers.append(found)
        self.threads.append(threading.current_thread())

    def last(self) -> list[PastRequest]:
        wait_until(lambda: len(self.answers) > 1, "there is an answer")
        return self.answers[-1]


@contextmanager
def daemon(folder: Path, seconds_between_saves: float = 3600) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon in a process of its own; killed at the end."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from history_daemon import serve; serve(sys.argv[2], sys.argv[3], float(sys.argv[4]))"
    )
    helpers = Path(__file__).parents[1] / "daemon"
    arguments = [str(helpers), str(folder / "socket"), str(folder / "kept"), str(seconds_between_saves)]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"serving\n"
        try:
            yield process
        finally:
            process.kill()


def test_an_engine_finds_what_another_has_left(tmp_path: Path) -> None:
    with (
        ServedDaemon(tmp_path / "socket") as served,
        closing(engine(served.path)) as first,
        closing(engine(served.path)) as second,
    ):
        for seed in range(4):
            first.history.add(past_request(seed, axis=seed))
        wait_until(lambda: second.history.num_requests == 4, "the other engine hears of it")
        found = Seeker(second, axis=2)
        assert found.answers[0] == [], "a step does not wait for the daemon"
        assert same(found.last()[0].trace, past_request(2, axis=2))
        assert {past.trace.num_tokens for past in found.last()} == {5} and len(found.last()) == 4
        assert found.threads[0] is threading.current_thread() is not found.threads[1]
        assert (second.history.num_tokens, len(second.history.requests)) == (20, 0)


def test_an_engine_that_comes_later_starts_with_the_latest_requests(tmp_path: Path) -> None:
    with ServedDaemon(tmp_path / "socket") as served:
        with closing(engine(served.path)) as first:
            for seed in range(3):
                first.history.add(past_request(seed))
        with closing(engine(served.path)) as second:
            numbers = [
                next(s for s in range(3) if same(past.trace, past_request(s))) for past in second.history.requests
            ]
            assert numbers == [0, 1, 2]
            predictor = predictor_for_engine("history", ModelShape(*SHAPE), second.history, None)
            token = int(past_request(2).tokens[-1])  # type: ignore[index]
            remembered = predictor.memory.recall(token)
            assert remembered is not None and np.array_equal(remembered.experts, past_request(2).experts[-1])


def test_neighbours_are_those_of_all_engines_as_soon_as_the_daemon_has_answered(tmp_path: Path) -> None:
    with (
        ServedDaemon(tmp_path / "socket") as served,
        closing(engine(served.path)) as first,
        closing(engine(served.path)) as second,
    ):
        predictor = predictor_for_engine("history", ModelShape(*SHAPE), second.history, None)
        assert isinstance(predictor, HistoryPredictor)
        past = past_request(1, tokens=40, axis=3)
        first.history.add(past)
        wait_until(lambda: second.history.num_requests == 1, "the daemon has it")
        state = predictor.start_request(np.eye(6, dtype=np.float32)[3])
        wait_until(lambda: len(state.predictor_state.tokens) == 40, "candidates are there")  # type: ignore[attr-defined]
        step = predictor.begin([state.context()])
        for layer in range(3):
            step.observe(layer, past.experts[7:8, layer], past.weights[7:8, layer])
        assert set(np.argsort(-step.predict(3)[0])[:2]) == set(past.experts[7, 3])


def test_only_one_rank_tells(tmp_path: Path) -> None:
    with ServedDaemon(tmp_path / "socket") as served:
        with closing(engine(served.path)) as first, closing(engine(served.path, tells=False)) as second:
            second.history.add(past_request(1))
            first.history.add(past_request(2))
        with closing(engine(served.path)) as third:
            assert third.history.num_requests == 1


def test_without_a_daemon_it_goes_on_with_its_own(tmp_path: Path, said: list[str]) -> None:
    with closing(engine(tmp_path / "socket")) as alone:
        alone.history.add(past_request(1, axis=1))
        found = Seeker(alone, axis=1)
        assert same(found.answers[-1][0].trace, past_request(1, axis=1)) and alone.folder is None
        assert alone.snapshot(tmp_path) is None
    assert not said


def test_what_a_killed_daemon_had_not_saved_goes_to_the_next_one(tmp_path: Path) -> None:
    """Two engines; the daemon saves nothing before it is killed."""
    socket = tmp_path / "socket"
    with daemon(tmp_path) as process, closing(engine(socket)) as first, closing(engine(socket)) as second:
        first.history.add(past_request(1, axis=1))
        second.history.add(past_request(2, axis=2))
        wait_until(lambda: first.history.num_requests == second.history.num_requests == 2, "it has both")
        process.kill()
        process.wait()
        first.history.add(past_request(3, axis=3))
        wait_until(lambda: len(Seeker(first, axis=3).answers) == 2, "it notices")
        assert same(Seeker(first, axis=3).last()[0].trace, past_request(3, axis=3))
        with daemon(tmp_path):
            wait_until(lambda: len(Seeker(second, axis=3).last()) == 3, "the new daemon has all three")
            assert same(Seeker(second, axis=3).last()[0].trace, past_request(3, axis=3))
    assert not HistoryArchive(tmp_path / "kept").path(FINGERPRINT).exists()


def test_what_a_killed_daemon_had_saved_is_not_there_twice(tmp_path: Path) -> None:
    with closing(engine(tmp_path / "socket")) as first:
        with daemon(tmp_path, seconds_between_saves=0.05) as process:
            for seed in range(4):
                first.history.add(past_request(seed))
            archive = HistoryArchive(tmp_path / "kept")
            wait_until(lambda: (archive.outline(FINGERPRINT) or (0,))[0] == 20, "it is saved")
            process.kill()
        first.history.add(past_request(4))
        with daemon(tmp_path, seconds_between_saves=0.05):
            wait_until(lambda: (archive.outline(FINGERPRINT) or (0,))[0] == 25, "the new one goes on")
        kept = archive.read(FINGERPRINT)
        assert all(same(kept.request(seed), past_request(seed)) for seed in range(5))


def test_a_request_the_daemon_does_not_want_is_said_and_the_others_still_go(tmp_path: Path, said: list[str]) -> None:
    with ServedDaemon(tmp_path / "socket") as served, closing(engine(served.path)) as first:
        first.history.add(past_request(1))
        first.history.add(replace(past_request(2), embeddings=None))
        wait_until(lambda: served.histories.open(OPEN).size.requests == 2, "both are there")
        first._client.tell(replace(past_request(3), embeddings=np.zeros((1, 3), np.float16)))
        wait_until(lambda: bool(said), "it hears the reason")
        first.history.add(past_request(4))
        wait_until(lambda: served.histories.open(OPEN).size.requests == 3, "the others go on")
    assert len(said) == 1 and "not remembered" in said[0] and "an embedding of 3 numbers" in said[0]


def test_a_daemon_that_refuses_is_left_alone_and_named(tmp_path: Path, said: list[str]) -> None:
    with ServedDaemon(tmp_path / "socket") as served, closing(engine(served.path)):
        wider = OpenHistory(FINGERPRINT, (4, 9, 2), STORE)
        with closing(SharedHistory(served.path, wider, 1000, True)) as refused:
            refused.history.add(replace(past_request(1), num_experts=9))
            assert len(Seeker(refused).answers[-1]) == 1
    assert len(said) == 1 and "does not share its history" in said[0] and "maps of shape (4, 8, 2)" in said[0]


def test_whoever_cannot_use_an_answer_spoils_it_for_nobody_else(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_client, "BACKOFF_SECONDS", 0.05)
    with ServedDaemon(tmp_path / "socket") as served, closing(engine(served.path)) as first:
        assert first._client.ask(None, 10, lambda trace: 1 / 0)  # type: ignore[arg-type, return-value]
        wait_until(lambda: bool(said), "it is said")
        wait_until(lambda: first._client._connection is not None, "it has connected again")
        first.history.add(past_request(1))
        wait_until(lambda: served.histories.open(OPEN).size.requests == 1, "requests are told")
        assert len(Seeker(first).last()) == 1
    assert "ZeroDivisionError" in said[0]


def test_an_engine_ends_promptly_although_the_daemon_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_client, "CLOSE_SECONDS", 0.2)
    with ServedDaemon(tmp_path / "socket") as served:
        history = served.histories.open(OPEN)
        first = engine(served.path)
        with history._lock:
            first.history.add(past_request(1))
            seeker = Seeker(first)
            began = time.monotonic()
            first.close()
            assert time.monotonic() - began < 5
        assert len(seeker.answers) == 2 and len(seeker.answers[-1]) == 1, "the question is not left open"


def test_the_last_requests_are_told_before_the_engine_ends(tmp_path: Path) -> None:
    with ServedDaemon(tmp_path / "socket") as served:
        first = engine(served.path)
        for seed in range(50):
            first.history.add(past_request(seed))
        first.close()
        assert served.histories.open(OPEN).size.requests == 50


def test_what_is_learned_from_is_the_whole_history_or_nothing_yet(tmp_path: Path) -> None:
    with (
        ServedDaemon(tmp_path / "socket", history=tmp_path / "kept") as served,
        closing(engine(served.path)) as first,
        closing(engine(served.path)) as second,
    ):
        first.history.add(past_request(1, tokens=30))
        second.history.add(past_request(2, tokens=30))
        wait_until(lambda: first.history.num_tokens == 60, "both are there")
        fresh = first.snapshot(tmp_path)
        assert fresh == tmp_path / "history.npz" and read_trace(fresh).num_tokens == 60, "asked for"
        history = served.histories.open(OPEN)
        history.save(at_once=True)
        assert first.snapshot(tmp_path) == tmp_path / "kept" / FINGERPRINT / "history.npz"
        assert first.folder == second.folder == tmp_path / "kept" / FINGERPRINT


def test_a_daemon_without_a_folder_is_asked_for_what_to_learn_from(tmp_path: Path) -> None:
    with ServedDaemon(tmp_path / "socket") as served, closing(engine(served.path)) as first:
        first.history.add(past_request(1, tokens=30))
        wait_until(lambda: served.histories.open(OPEN).size.requests == 1, "it is there")
        file = first.snapshot(tmp_path)
        assert first.folder is None and file is not None
        assert read_trace(file).fingerprint == FINGERPRINT and read_trace(file).num_tokens == 30
