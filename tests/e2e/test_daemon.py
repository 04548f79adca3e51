"""Engines that share a daemon: plain vLLM's tokens, one copy of the experts, and no end when the daemon ends."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.daemon.processes import DaemonProcess, running_daemon
from tests.e2e.engines import EngineServer
from tests.e2e.identity import ROUNDS, prompts
from tests.e2e.live_engine import LiveEngine
from tests.e2e.observing import OBSERVED, keep_spans, live_page, pages_of_metrics, report_now, spans_of_requests
from tests.models import Checkpoint, build
from vllm_moe_offload.report.metrics import PREFIX, described_worker_metrics

TINY_MOE = {"enforce_eager": True, "dtype": "bfloat16"}
ROOM = 1.1
"""What pages at the ends of records may add."""


def store_root() -> Path:
    return Path(os.environ["VLLM_MOE_OFFLOAD_STORE_ROOT"])


def through(daemon: DaemonProcess, **settings: Any) -> dict[str, Any]:
    offload = {"daemon": f"unix:{daemon.socket}", "predictor": "none"} | settings
    return {"additional_config": {"moe_offload": offload}}


@pytest.fixture(scope="module")
def tiny_moe_bytes(tiny_moe: Path, offloaded: EngineServer) -> int:
    """Of its experts."""
    embedded = {"additional_config": {"moe_offload": {"cache": "100%", "daemon": "off"}}}
    return offloaded.run(tiny_moe, TINY_MOE | embedded, ROUNDS[:1])["stats"][0]["expert_bytes"]


def test_same_tokens_through_a_daemon(
    checkpoint: Checkpoint, plain: EngineServer, offloaded: EngineServer, tmp_path: Path
) -> None:
    """With all experts on a lease, and with a quarter of them where a step in waves is rounded like a whole one."""
    engine = checkpoint.engine_args | {"enforce_eager": True}
    expected = plain.run(checkpoint.path, engine, ROUNDS)["rounds"]
    room = 64 << 20
    for share in (1.0,) if checkpoint.rounded_by_batch else (1.0, 0.25):
        with running_daemon(tmp_path / f"{share}.sock", room, store_root()) as daemon:
            answer = offloaded.run(checkpoint.path, engine | through(daemon, cache=f"{share:.0%}"), ROUNDS)
            assert answer["rounds"] == expected
            stats = answer["stats"][0]
            assert stats["daemon_pid"] == daemon.pid
            assert stats["layers"] == checkpoint.routed_layers and stats["failed_loads"] == 0
            assert (stats["misses"] > 0) == (share < 1)
            (model,) = daemon.status().models
            assert model.stats["resident_experts"] <= model.stats["slots"] and not model.workers
            room = int(stats["expert_bytes"] * 0.25 * ROOM)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_next_engine_finds_the_daemon_warm(
    tiny_moe: Path, tiny_moe_bytes: int, offloaded: EngineServer, tmp_path: Path, share: float
) -> None:
    """What the first engine's request used is still resident, so the second engine's same request misses nothing.

    In a quarter of the slots the request is one that cannot need more experts than these: which experts of a longer one
    are left at its end depends on when loads arrive.
    """
    tokens = 1 if share < 1 else 48
    one_request = [{"prompts": [prompts(1, seed=6)[0][:3]], "tokens": tokens}]
    with running_daemon(tmp_path / "daemon.sock", int(tiny_moe_bytes * share * ROOM), store_root()) as daemon:
        first, second = (
            offloaded.run(tiny_moe, TINY_MOE | through(daemon, cache=f"{share:.0%}"), one_request) for _ in range(2)
        )
        assert first["rounds"] == second["rounds"]
        (model,) = daemon.status().models
        if share == 1:
            stats = model.stats
            assert stats["loads"] == stats["resident_experts"] == stats["experts"], "the second engine read again"
        else:
            assert first["stats"][0]["misses"] > second["stats"][0]["misses"] == 0, "the second engine started cold"


def test_two_models_in_one_daemon(
    plain: EngineServer, offloaded: EngineServer, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engines = [LiveEngine(tmp_path / f"{name}.log") for name in ("mixtral", "gpt-oss")]
    models = [build(name, tmp_path_factory.mktemp(name)) for name in ("mixtral", "gpt-oss")]
    texts = prompts(8, seed=5)
    try:
        with running_daemon(tmp_path / "daemon.sock", 3 << 19, store_root()) as daemon:
            for engine, model in zip(engines, models, strict=True):
                settings = through(daemon, cache="25%")["additional_config"]["moe_offload"]
                engine.start(model.path, model.engine_args, **settings)
            for _ in range(3):
                for engine in engines:
                    engine.begin("generate", texts, 8)
                answers = [engine.end() for engine in engines]
            assert len(daemon.status().models) == 2
            assert all(engine.stats()["daemon_pid"] == daemon.pid for engine in engines)
            assert sum(model.stats["resident_bytes"] for model in daemon.status().models) <= 3 << 19
            for engine in engines:
                engine.close()
    finally:
        for engine in engines:
            engine.process.kill()
    for model, answer in zip(models, answers, strict=True):
        rounds = [{"prompts": texts, "tokens": 8}]
        expected = plain.run(model.path, model.engine_args | {"enforce_eager": True}, rounds)["rounds"][0]
        assert [got.tokens for got in answer] == [wanted["tokens"] for wanted in expected]


@pytest.fixture
def living(tiny_moe: Path, tmp_path: Path) -> Iterator[LiveEngine]:
    engine = LiveEngine(tmp_path / "engine.log")
    yield engine
    engine.process.kill()
    engine.process.join()


@pytest.mark.parametrize("cache", ["25%", "100%"])
def test_the_daemon_may_die_and_return(
    living: LiveEngine, plain: EngineServer, tiny_moe: Path, tmp_path: Path, cache: str
) -> None:
    """Killed and stopped while the engine generates; it goes on, and is attached to the next daemon."""
    texts = prompts(4, seed=9)
    arguments = {"dtype": "bfloat16", "skip_tokenizer_init": True}
    (expected,) = plain.run(tiny_moe, arguments | {"enforce_eager": True}, [{"prompts": texts, "tokens": 32}])["rounds"]
    budget = (40 if cache == "100%" else 10) << 20
    daemons = [DaemonProcess(tmp_path / "daemon.sock", budget, store_root())]
    try:
        settings = through(daemons[0], cache=cache)["additional_config"]["moe_offload"]
        living.start(tiny_moe, arguments, **settings)
        for end in (DaemonProcess.kill, DaemonProcess.stop, DaemonProcess.kill):
            assert living.stats()["daemon_pid"] == daemons[-1].pid
            living.begin("generate", texts, 32)
            living.answered(0.2)
            end(daemons[-1])
            assert [answer.tokens for answer in living.end()] == [one["tokens"] for one in expected]
            daemons.append(DaemonProcess(tmp_path / "daemon.sock", budget, store_root()))
            for _ in range(100):
                answers = living.generate(texts, 32)
                assert [answer.tokens for answer in answers] == [one["tokens"] for one in expected]
                if living.stats()["daemon_pid"] == daemons[-1].pid:
                    break
            else:
                pytest.fail("the engine did not come back to the daemon")
        living.close()
        daemons[-1].stop()
    finally:
        for daemon in daemons:
            daemon.abandon()


def test_a_daemon_started_on_demand_and_named_in_the_environment(
    tiny_moe: Path, plain: EngineServer, tmp_path: Path
) -> None:
    texts = prompts(2, seed=4)
    arguments = {"dtype": "bfloat16", "skip_tokenizer_init": True}
    (expected,) = plain.run(tiny_moe, arguments | {"enforce_eager": True}, [{"prompts": texts, "tokens": 8}])["rounds"]
    engine = LiveEngine(tmp_path / "engine.log", XDG_RUNTIME_DIR=str(tmp_path))
    try:
        engine.run(keep_spans)
        engine.start(tiny_moe, arguments | OBSERVED, cache="25%", daemon="start", predictor="none", page=True)
        assert [answer.tokens for answer in engine.generate(texts, 8)] == [one["tokens"] for one in expected]
        pid = engine.stats()["daemon_pid"]
        assert pid > 0
        check_what_others_see(engine, tiny_moe)
        engine.close()
        os.kill(pid, 15)
    finally:
        engine.process.kill()


def check_what_others_see(engine: LiveEngine, model: Path) -> None:
    """Every metric is on vLLM's page and says what the RPC says; spans say how long their requests waited."""
    stats = engine.stats()
    assert stats["stall_seconds"] > 0
    engine.call(report_now)
    alone, several = engine.call(pages_of_metrics)
    samples: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(several):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    ours = "".join(line for line in alone.splitlines(keepends=True) if PREFIX in line)
    assert ours == "".join(line for line in several.splitlines(keepends=True) if PREFIX in line)
    for described in described_worker_metrics():
        suffix = "_count" if described.kind == "histogram" else ""
        found = samples[described.name + suffix]
        assert all(sample.labels.keys() == {*described.labels, *described.own_labels} for sample in found)
        assert all(sample.labels["model_name"] == str(model) and sample.labels["rank"] == "0" for sample in found)
    for name in ("hits", "misses", "loads", "stall_seconds", "tokens"):
        assert samples[f"{PREFIX}{name}_total"][0].value == pytest.approx(stats[name])
    assert samples[f"{PREFIX}daemon_attached"][0].value == 1
    assert samples[f"{PREFIX}step_stall_seconds_count"][0].value == stats["steps"]
    shown = engine.call(live_page)["model"]
    assert [shown["totals"][name] for name in ("hits", "misses", "tokens")] == [
        stats["hits"],
        stats["misses"],
        stats["tokens"],
    ]
    assert sum(shown["experts"]["hits"]) == stats["hits"] and shown["experts"]["known"] and shown["daemon"]
    stalled = [attributes["moe_offload.stall_seconds"] for attributes in engine.call(spans_of_requests)]
    assert len(stalled) == 2 and 0 < max(stalled) <= stats["stall_seconds"] * 1.001


def test_a_daemon_that_was_named_must_be_there(living: LiveEngine, tiny_moe: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"no daemon answers at .*nobody\.sock"):
        living.start(tiny_moe, {"dtype": "bfloat16"}, cache="25%", daemon=f"unix:{tmp_path}/nobody.sock")
