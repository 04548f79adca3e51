"""What an engine does with its past while it runs: learns from it, keeps it where it may, and lets go of it all."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.daemon.wire import wait_until
from tests.e2e.live_engine import EngineError, LiveEngine

CACHE = {"cache": "25%"}


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 8192) for _ in range(draw.randint(10, 60))] for _ in range(count)]


def lengths(prompt: list[int]) -> list[float]:
    """A user's embedding function."""
    return [float(len(prompt)), 1.0]


def embeddings(worker: Any) -> list[list[float]]:
    history = worker.model_runner.get_model().moe_offload._history.kept.history
    return [past.trace.embeddings[0].tolist() for past in history.requests]


def learn_faster(worker: Any) -> None:
    """Only for how long it takes: all of a core instead of a twentieth, looked after every 0.2 s."""
    from vllm_moe_offload.learning import supervisor

    supervisor.CPU_SHARE = 1.0
    worker.model_runner.get_model().moe_offload._history._background._period = 0.2


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LiveEngine]:
    live = LiveEngine(tmp_path / "log")
    yield live
    live.process.kill()
    live.process.join()


def test_heads_that_finish_while_the_engine_runs_are_taken_over(
    tiny_moe: Path, engine: LiveEngine, tmp_path: Path
) -> None:
    engine.start(tiny_moe, {"dtype": "bfloat16"}, **CACHE, predictor="history", history=str(tmp_path / "history"))
    engine.call(learn_faster)
    before = engine.stats()
    assert before["history_tokens"] == before["learned_tokens"] == 0
    engine.generate(prompts(12, seed=1), tokens=40)
    # learning has the lowest priority: while the engine runs it hardly gets on
    wait_until(lambda: any(tmp_path.glob("history/*/heads.npz")), "heads have been learned", 300)
    deadline = time.monotonic() + 60
    while not (young := engine.stats())["learned_tokens"]:
        assert time.monotonic() < deadline, engine.log.read_text()[-3000:]
        engine.generate(prompts(1, seed=2), tokens=2)
    assert (
        young["learned_tokens"] >= 512
        and f"heads learned from {young['learned_tokens']} tokens" in engine.log.read_text()
    )


def test_a_users_embedding_is_what_the_history_knows_of_a_request(
    tiny_moe: Path, engine: LiveEngine, tmp_path: Path
) -> None:
    history = tmp_path / "history"
    settings = CACHE | {"predictor": "history", "history": str(history)}
    engine.start(tiny_moe, {}, **settings, embedding="tests.e2e.test_remembering:lengths")
    engine.generate([[1, 2, 3], [4]], tokens=2)
    engine.generate([[5]], tokens=1)
    remembered = {tuple(round(part, 2) for part in vector) for vector in engine.call(embeddings)}
    engine.stop()
    assert {(0.95, 0.32), (0.71, 0.71)} <= remembered
    engine.start(tiny_moe, {}, **settings)
    engine.stop()
    engine.start(tiny_moe, {}, **settings, embedding="tests.e2e.test_remembering:lengths")
    assert engine.stats()["history_requests"] == 3, "vectors of different functions are kept apart"
    engine.stop()
    with pytest.raises(EngineError, match=r"ConfigError: embedding = 'tests\.e2e\.test_remembering:missing' cannot be"):
        engine.start(tiny_moe, {}, **settings, embedding="tests.e2e.test_remembering:missing")


def test_an_engine_that_ends_lets_go_of_its_threads_and_files(
    tiny_moe: Path, engine: LiveEngine, tmp_path: Path
) -> None:
    process = psutil.Process(engine.process.pid)
    held = []
    for number in range(3):
        engine.start(tiny_moe, {}, **CACHE, predictor="history", history=str(tmp_path / "history"))
        engine.generate(prompts(1, seed=number), tokens=4)
        engine.stop()
        held.append((process.num_threads(), process.num_fds(), len(process.children())))
    assert held[1] == held[2], "the first engine starts what the process keeps"
    files = {file.path for file in process.open_files()}
    assert not any("records" in Path(path).name or "stores" in path for path in files), files


def test_a_folder_that_cannot_be_written_is_refused_only_where_it_was_named(
    tiny_moe: Path, engine: LiveEngine, tmp_path: Path
) -> None:
    (tmp_path / "history").write_text("a file is in the way")
    with pytest.raises(
        EngineError, match=r"ConfigError: history = '.*/history': .*; name a folder that can be written"
    ):
        engine.start(tiny_moe, {}, **CACHE, predictor="history", history=str(tmp_path / "history"))
    engine.start(tiny_moe, {}, **CACHE, predictor="history", store=str(tmp_path / "stores"))
    engine.generate([[1, 2, 3]], tokens=2)
    engine.generate([[1, 2, 3]], tokens=2)
    assert engine.stats()["history_requests"] >= 1
    engine.stop()
    assert "the history stays in memory and ends with this engine" in engine.log.read_text()
