"""Engines that share a daemon share what they remember: one starts with what the other left, and none ends with it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.processes import DaemonProcess, running_daemon
from tests.daemon.wire import wait_until
from tests.e2e.engines import EngineServer
from tests.e2e.identity import prompts
from tests.e2e.live_engine import LiveEngine
from vllm_moe_offload.trace.trace_file import read_trace

BUDGET = 10 << 20
ARGUMENTS = {"dtype": "bfloat16", "skip_tokenizer_init": True}
PAST = prompts(12, seed=1)
FIRST, SECOND = prompts(3, seed=2), prompts(5, seed=3)


def store_root() -> Path:
    return Path(os.environ["VLLM_MOE_OFFLOAD_STORE_ROOT"])


def settings(daemon: DaemonProcess, **more: Any) -> dict[str, Any]:
    return {"cache": "25%", "daemon": f"unix:{daemon.socket}", "predictor": "history"} | more


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[tuple[LiveEngine, LiveEngine]]:
    pair = LiveEngine(tmp_path / "first.log"), LiveEngine(tmp_path / "second.log")
    yield pair
    for engine in pair:
        engine.process.kill()
        engine.process.join()


def expect(plain: EngineServer, model: Path, texts: list[list[int]], tokens: int) -> list[list[int]]:
    rounds = [{"prompts": texts, "tokens": tokens}]
    return [one["tokens"] for one in plain.run(model, ARGUMENTS | {"enforce_eager": True}, rounds)["rounds"][0]]


def remembered(daemon: DaemonProcess, requests: int) -> None:
    """Engines tell of a request when their next step begins, or when they end."""
    wait_until(
        lambda: [model.stats["history_requests"] for model in daemon.status().models] == [requests],
        f"{requests} requests are remembered",
        30,
    )


def test_an_engine_starts_with_what_another_has_left(
    tiny_moe: Path, plain: EngineServer, offloaded: EngineServer, tmp_path: Path
) -> None:
    """One after the other; the first leaves 12 requests behind."""
    expected = expect(plain, tiny_moe, FIRST, 40)
    with running_daemon(tmp_path / "daemon.sock", BUDGET, store_root(), "--history", str(tmp_path / "kept")) as daemon:
        engine = ARGUMENTS | {"enforce_eager": True, "additional_config": {"moe_offload": settings(daemon)}}
        before = offloaded.run(tiny_moe, engine, [{"prompts": PAST, "tokens": 48}])["stats"][0]
        remembered(daemon, len(PAST))
        answer = offloaded.run(tiny_moe, engine, [{"prompts": FIRST[:1], "tokens": 40}])
        stats = answer["stats"][0]
        assert [one["tokens"] for one in answer["rounds"][0]] == expected[:1]
        assert before["history_requests"] < len(PAST) == stats["history_requests"]
        assert stats["daemon_pid"] == daemon.pid and stats["prefetches"] > 0
        assert stats["prefetch_useful"] + stats["prefetch_late"] > 0
        remembered(daemon, len(PAST) + 1)
    (kept,) = (tmp_path / "kept").glob("*/history.npz")
    trace = read_trace(kept)
    assert trace.num_requests == len(PAST) + 1 and trace.embeddings is not None


def test_engines_that_run_together_remember_together_and_outlive_the_daemon(
    tiny_moe: Path, plain: EngineServer, engines: tuple[LiveEngine, LiveEngine], tmp_path: Path
) -> None:
    # All different: what a daemon may have had already is kept once, whoever brings it.
    texts = [prompts(3, seed) for seed in (5, 6, 7, 8)]
    expected = expect(plain, tiny_moe, [text for some in texts for text in some], 24)
    total = len(expected) + 2
    flush = iter([text] for text in PAST)
    options = ("--history", str(tmp_path / "kept"))
    daemons = [DaemonProcess(tmp_path / "daemon.sock", BUDGET, store_root(), *options)]

    def serve(engine: LiveEngine, number: int) -> None:
        answers = engine.generate(texts[number], 24)
        assert [answer.tokens for answer in answers] == expected[3 * number : 3 * number + 3]

    try:
        for number, engine in enumerate(engines):
            engine.start(tiny_moe, ARGUMENTS, **settings(daemons[0]))
            serve(engine, number)
            engine.generate(next(flush), 1)
        remembered(daemons[0], 6)
        daemons[0].kill()
        for number, engine in enumerate(engines):
            serve(engine, 2 + number)
        daemons.append(DaemonProcess(tmp_path / "daemon.sock", BUDGET, store_root(), *options))
        for engine in engines:
            engine.generate(next(flush), 1)
        remembered(daemons[1], total)
        for engine in engines:
            engine.close()
        daemons[1].stop()
    finally:
        for daemon in daemons:
            daemon.abandon()
    (kept,) = (tmp_path / "kept").glob("*/history.npz")
    assert read_trace(kept).num_requests == total


def test_one_rank_predicts_and_both_are_prefetched_for(tiny_moe: Path, tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    ranks = EngineServer(tmp_path / "ranks.log", VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[-1]}")
    options = ("--history", str(tmp_path / "kept"))
    try:
        with running_daemon(tmp_path / "daemon.sock", BUDGET, store_root(), *options) as daemon:
            offload = {"moe_offload": settings(daemon)}
            engine = ARGUMENTS | {"enforce_eager": True, "tensor_parallel_size": 2, "additional_config": offload}
            rounds = [{"prompts": PAST, "tokens": 24}, *({"prompts": [text], "tokens": 30} for text in FIRST)]
            first, second = ranks.run(tiny_moe, engine, rounds)["stats"]
            models = daemon.status().models
            assert sorted(model.stats["history_requests"] for model in models) == [0, len(PAST) + len(FIRST)]
    finally:
        ranks.close()
    assert first["daemon_pid"] == second["daemon_pid"] == daemon.pid
    assert first["history_requests"] > 0 and second["history_requests"] == 0
    assert first["prefetches"] > 0 and second["prefetches"] == 0
    assert len(models) == 2 and all(model.stats["prefetches"] > 0 for model in models)


def test_a_history_of_its_own_stays_its_own(tiny_moe: Path, offloaded: EngineServer, tmp_path: Path) -> None:
    """Whoever names a folder, or 'off', means it."""
    with running_daemon(tmp_path / "daemon.sock", BUDGET, store_root(), "--history", str(tmp_path / "kept")) as daemon:
        for history in (str(tmp_path / "own"), "off"):
            offload = {"moe_offload": settings(daemon, history=history)}
            engine = ARGUMENTS | {"enforce_eager": True, "additional_config": offload}
            offloaded.run(tiny_moe, engine, [{"prompts": FIRST, "tokens": 4}])
        remembered(daemon, 0)
    assert len(list((tmp_path / "own").glob("*/history.npz"))) == 1 and not list((tmp_path / "kept").iterdir())
