"""Heads are learned in another process, found again at the next start, and never believed when damaged."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import vllm_moe_offload
from vllm_moe_offload.errors import TraceError
from vllm_moe_offload.learning import supervisor as learning_module
from vllm_moe_offload.learning.heads_file import LEARNED_VECTORS_HEADS_FILE, LOCK_FILE, read_heads, write_heads
from vllm_moe_offload.learning.supervisor import LearningSupervisor
from vllm_moe_offload.predict.base import ModelShape
from vllm_moe_offload.predict.history import HistoryPredictor
from vllm_moe_offload.predict.network import NetworkSize, Parameters
from vllm_moe_offload.predict.registry import predictor_for_engine
from vllm_moe_offload.predict.token_vectors import LearnedVectors, ModelVectors, TokenVectors
from vllm_moe_offload.trace.archive import HistoryArchive
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.persistence import LocalHistory, seconds_between_saves
from vllm_moe_offload.trace.trace import Trace

SHAPE = ModelShape(3, 8, 2)
SIZE = NetworkSize(3, 8, 16)


@pytest.fixture(autouse=True)
def whole_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings do not sleep most of the time."""
    monkeypatch.setattr(learning_module, "CPU_SHARE", 1.0)


def request(tokens: int, seed: int = 0) -> Trace:
    """A request in which the token alone says where it goes."""
    read = np.random.default_rng(seed).integers(0, 4, tokens).astype(np.int32)
    experts = np.stack([np.stack([2 * read, 2 * read + 1], axis=1)] * SHAPE.layers, axis=1).astype(np.uint8)
    weights = np.full(experts.shape, 0.5, np.float16)
    return Trace(experts, weights, np.array([0, tokens]), SHAPE.experts, tokens=read)


def embed(tokens: np.ndarray) -> np.ndarray:
    return np.eye(16, dtype=np.float32)[tokens]


def engine(
    folder: Path,
    vectors: TokenVectors | None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[HistoryPredictor, LearningSupervisor]:
    """What one engine has of the histories in ``folder``."""
    kept = LocalHistory(HistoryArchive(folder), "ab", SHAPE, writes=False)
    made = predictor_for_engine("history", SHAPE, kept.history, vectors)
    assert isinstance(made, HistoryPredictor)
    return made, LearningSupervisor(made, kept, vectors, None, clock)


def learn(learning: LearningSupervisor) -> None:
    """Let the training that is due come to its end."""
    learning.poll()
    assert learning._process is not None and learning._process.wait(120) == 0
    learning.poll()
    assert learning._process is None


@pytest.mark.parametrize("vectors", [None, ModelVectors(embed, 16)], ids=["learned", "the model's"])
def test_heads_are_learned_beside_the_engine_and_found_at_the_next_start(
    tmp_path: Path, said: list[str], vectors: TokenVectors | None
) -> None:
    young, learning = engine(tmp_path, vectors)
    learning.poll()
    assert learning._process is None, "there is nothing to learn from"
    young.history.add(request(600))
    learning.poll()
    assert learning._process is not None and young.heads is None
    assert learning._process.wait(120) == 0
    learning.poll()
    assert young.heads is not None and young.trained_tokens == 600 and not young.training_due
    learning.close()

    restarted, learning = engine(tmp_path, vectors)
    learning.close()
    step = restarted.begin([restarted.start_request().context(2)])
    np.testing.assert_array_equal(np.argsort(-step.predict(0)[0])[:2] // 2, [2, 2])
    assert restarted.trained_tokens == 600 and "heads learned from 600 tokens" in said[-1]


def test_a_training_that_fails_is_reported_and_tried_again_later_while_the_old_heads_serve(tmp_path: Path) -> None:
    now = [1000.0]
    young, learning = engine(tmp_path, None, clock=lambda: now[0])
    young.history.add(request(600))
    learn(learning)
    heads = young.heads
    young.history.add(request(700, seed=1))
    for delay in (60, 120):
        learning.poll()
        assert learning._process is not None
        learning._process.terminate()
        learning._process.wait(60)
        with pytest.raises(RuntimeError, match="learning from the history ended with -15; it will be tried again"):
            learning.poll()
        now[0] += delay - 1
        learning.poll()
        assert learning._process is None and young.heads is heads is not None
        now[0] += 1
    learn(learning)
    assert young.trained_tokens == 1300 and young.heads is not heads
    learning.close()


def test_a_training_whose_heads_are_unusable_has_failed(tmp_path: Path) -> None:
    now = [1000.0]
    young, learning = engine(tmp_path, None, clock=lambda: now[0])
    young.history.add(request(600))
    learning.poll()
    assert learning._process is not None and learning._process.wait(120) == 0
    (tmp_path / "ab" / LEARNED_VECTORS_HEADS_FILE).write_bytes(b"")
    with pytest.raises(RuntimeError, match="left no heads"):
        learning.poll()
    learning.poll()
    assert learning._process is None, "not again at once"
    now[0] += 60
    learn(learning)
    assert young.heads is not None
    learning.close()


def fill(history: HistoryStore, seed: int) -> int:
    """Requests of 50 tokens until nothing of what was there before is left, or the history is full. The next seed."""
    before = history.requests[-1].number if history.requests else -1
    while not (grown := history.num_tokens) or history.requests[0].number <= before or before < 0:
        history.add(request(50, seed))
        seed += 1
        if before < 0 and history.num_tokens <= grown:
            break
    return seed


def test_heads_are_learned_again_when_a_full_history_holds_other_requests(tmp_path: Path) -> None:
    young, learning = engine(tmp_path, None)
    young.history.prune(16_000)
    seed = fill(young.history, 0)
    held = young.history.num_tokens
    learn(learning)
    assert young.trained_tokens == held >= 512 and not young.training_due
    young.history.add(request(50, seed))
    assert young.history.num_tokens == held, "it is full"
    assert not young.training_due, "for one request in all those"
    fill(young.history, seed + 1)
    assert young.history.num_tokens <= held
    heads = young.heads
    learn(learning)
    assert young.heads is not heads and not young.training_due
    learning.close()


def test_what_the_heads_have_not_seen_is_known_after_a_restart(tmp_path: Path) -> None:
    """Whoever saves the history, and however often engines start: half of it new means that heads are due."""
    archive = HistoryArchive(tmp_path)
    kept = LocalHistory(archive, "ab", SHAPE)
    for seed in range(20):
        kept.history.add(request(50, seed))
    kept.save(at_once=True)
    _, learning = engine(tmp_path, None)
    learn(learning)
    learning.close()
    for share, due in ((0.4, False), (0.6, True)):
        past = HistoryStore(SHAPE)
        for seed in range(20):
            past.add(request(50, seed + int(20 * share)))
        archive.save("ab", past)
        restarted, learning = engine(tmp_path, None)
        learning.close()
        assert restarted.trained_tokens == restarted.history.num_tokens == 1000
        assert restarted.training_due is due


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: write_heads(path, "another", Parameters(SIZE), LearnedVectors(16), [request(1)]),
        lambda path: write_heads(path, "ab", Parameters(SIZE._replace(experts=9)), LearnedVectors(16), [request(1)]),
        lambda path: write_heads(path, "ab", Parameters(SIZE), ModelVectors(embed, 16), [request(1)]),
    ],
    ids=["cut", "empty", "another model", "another shape", "other vectors"],
)
def test_heads_that_do_not_fit_are_set_aside_by_name(tmp_path: Path, said: list[str], damage) -> None:
    path = tmp_path / "ab" / LEARNED_VECTORS_HEADS_FILE
    path.parent.mkdir()
    write_heads(path, "ab", Parameters(SIZE), LearnedVectors(16), [request(1)])
    read_heads(path, "ab", SIZE, learned=True)
    damage(path)
    with pytest.raises(TraceError, match=r"heads-and-vectors\.npz: not heads of this model"):
        read_heads(path, "ab", SIZE, learned=True)
    young, learning = engine(tmp_path, None)
    learning.close()
    assert young.heads is None and not path.exists()
    assert len(list(path.parent.glob(f"{path.name}.unusable-*"))) == 1
    assert "learned anew" in said[0] and str(path) in said[0]


@pytest.mark.parametrize("vectors", [None, ModelVectors(embed, 16)], ids=["learned", "the model's"])
def test_engines_that_share_a_folder_learn_once(tmp_path: Path, vectors: TokenVectors | None) -> None:
    """The second starts nothing while the first learns, and takes over what it has learned."""
    first, learning = engine(tmp_path, vectors)
    second, waiting = engine(tmp_path, vectors)
    for one in (first, second):
        one.history.add(request(600))
    learning.poll()
    waiting.poll()
    assert learning._process is not None and waiting._process is None
    assert learning._process.wait(120) == 0
    waiting.poll()
    assert second.heads is not None and second.trained_tokens == 600
    learning.poll()
    assert first.heads is not None and waiting._process is learning._process is None
    second.history.add(request(700, seed=1))
    waiting.poll()
    assert waiting._process is not None, "whoever has seen more may learn next"
    waiting.close()
    learning.close()


def test_an_engine_that_is_gone_leaves_the_learning_to_others(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from vllm_moe_offload.store.lock import BuildLock\n"
        "lock = BuildLock.try_acquire(Path(sys.argv[1])); print('held', flush=True); input()"
    )
    (tmp_path / "ab").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "ab" / LOCK_FILE)]
    young, learning = engine(tmp_path, None)
    young.history.add(request(600))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        learning.poll()
        assert learning._process is None
        other.kill()
    learning.poll()
    assert learning._process is not None
    learning.close()


def test_what_cannot_be_learned_from_is_reported_and_tried_again_later(tmp_path: Path) -> None:
    def unreadable(tokens: np.ndarray) -> np.ndarray:
        if now[0] < 1060:
            raise IndexError("token 99 of 16")
        return embed(tokens)

    now = [1000.0]
    young, learning = engine(tmp_path, ModelVectors(unreadable, 16), clock=lambda: now[0])
    young.history.add(request(600))
    with pytest.raises(IndexError, match="token 99"):
        learning.poll()
    learning.poll()
    assert learning._process is None
    now[0] += 60
    learning.poll()
    assert learning._process is not None
    learning.close()


def test_a_history_is_written_when_it_has_grown_and_only_by_its_owner(tmp_path: Path) -> None:
    archive = HistoryArchive(tmp_path)
    kept = LocalHistory(archive, "ab", SHAPE)
    kept.save(at_once=True)
    assert not archive.path("ab").exists()
    kept.history.add(request(5))
    kept.save()
    assert not archive.path("ab").exists(), "not so soon after the start"
    kept.save(at_once=True)
    reader = LocalHistory(archive, "ab", SHAPE, writes=False)
    assert reader.history.num_tokens == 5
    reader.history.add(request(7, seed=1))
    reader.save(at_once=True)
    assert LocalHistory(archive, "ab", SHAPE).history.num_tokens == 5


def test_a_large_history_is_written_less_often_and_a_failure_is_not_repeated_at_once(
    tmp_path: Path,
) -> None:
    assert seconds_between_saves(1000) == 60 < seconds_between_saves(256 << 20)
    archive = HistoryArchive(tmp_path / "histories")
    kept = LocalHistory(archive, "ab", SHAPE)
    kept.history.add(request(5))
    archive.directory.write_text("in the way")
    with pytest.raises(OSError, match="histories"):
        kept.save(at_once=True)
    kept.save()
    archive.directory.unlink()
    kept.save()
    assert not archive.path("ab").exists()
    kept.close()
    assert archive.path("ab").exists()


def test_nothing_in_the_working_folder_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_module, "CPU_SHARE", 1.0)
    folder = tmp_path / "somebody's"
    folder.mkdir()
    (folder / "numpy.py").write_text("open('executed', 'w').close(); raise SystemExit(3)")
    monkeypatch.chdir(folder)
    young, learning = engine(tmp_path, None)
    young.history.add(request(600))
    learning.poll()
    assert learning._process is not None and learning._process.wait(120) == 0
    learning.close()
    assert not (folder / "executed").exists()


def test_every_interpreter_that_is_started_leaves_the_working_folder_out_of_its_path() -> None:
    package = Path(vllm_moe_offload.__file__).parent
    starts = [
        match for file in package.rglob("*.py") for match in re.findall(r"sys\.executable,\s*(.*)", file.read_text())
    ]
    assert len(starts) >= 4
    assert [start for start in starts if not start.startswith(('"-P"', '"-I"'))] == []
