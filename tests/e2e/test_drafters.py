"""Speculative decoding: a drafter's experts are offloaded like those of the model it drafts for, out of one budget.

A wrong draft changes no token, only how many are accepted: that must be what it is in plain vLLM.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.daemon.processes import running_daemon
from tests.e2e.engines import EngineServer
from tests.e2e.identity import prompts
from tests.e2e.live_engine import LiveEngine
from tests.integration.dense import dense_llama
from tests.models import build
from tests.models.deepseek import deepseek_v3_with_mtp
from tests.models.recipe import Checkpoint, write
from vllm_moe_offload.store import StoreRoot

ROUNDS = [{"prompts": prompts(5, seed=8), "tokens": 16}, {"prompts": prompts(1, seed=9), "tokens": 16}]


class Pair(NamedTuple):
    """A model and the engine arguments that give it a drafter."""

    path: Path
    engine: dict[str, Any]
    layers: int
    drafter_layers: int


def drafted_by(model: Checkpoint, drafter: Checkpoint) -> Pair:
    speculative = {"method": "draft_model", "model": str(drafter.path), "num_speculative_tokens": 3}
    return pair(model, speculative, drafter.routed_layers)


def pair(model: Checkpoint, speculative: dict[str, Any], drafter_layers: int) -> Pair:
    engine = model.engine_args | {
        "enforce_eager": True,
        "speculative_config": speculative,
        "disable_log_stats": False,
    }
    return Pair(model.path, engine, model.routed_layers, drafter_layers)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("drafters")
    qwen, olmoe = build("qwen3-moe", folder / "qwen3-moe"), build("olmoe", folder / "olmoe")
    dense = write(dense_llama(), folder / "dense")
    deepseek = write(deepseek_v3_with_mtp(), folder / "deepseek")
    return {
        "another MoE model": drafted_by(qwen, olmoe),
        "itself": drafted_by(qwen, qwen),
        "MTP": pair(deepseek, {"method": "mtp", "num_speculative_tokens": 1}, 1),
        "a dense model": drafted_by(qwen, dense),
        "a MoE model for a dense one": drafted_by(dense, olmoe),
    }


class Server(NamedTuple):
    engines: EngineServer
    log: Path
    stores: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("drafting")
    server = Server(EngineServer(folder / "log"), folder / "log", folder / "stores")
    yield server
    server.engines.close()


def offloading(server: Server, **settings: Any) -> dict[str, Any]:
    return {"additional_config": {"moe_offload": {"store": str(server.stores), **settings}}}


def check_same(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    assert ours["rounds"] == plain["rounds"]
    assert ours["drafts"] == plain["drafts"] and ours["drafts"]["draft_tokens"] > 0


@pytest.mark.parametrize("kind", ["another MoE model", "itself", "MTP", "a dense model", "a MoE model for a dense one"])
def test_a_drafter_shares_the_budget_and_drafts_what_it_drafts_in_plain_vllm(
    kind: str, pairs: dict[str, Pair], plain: EngineServer, server: Server
) -> None:
    path, engine, layers, drafter_layers = pairs[kind]
    expected = plain.run(path, engine, ROUNDS)
    answer = server.engines.run(path, engine | offloading(server, cache="50%"), ROUNDS)
    check_same(answer, expected)
    stats = answer["stats"][0]
    assert (stats.get("layers", 0), stats.get("drafter_layers", 0)) == (layers, drafter_layers)
    for owner in ("", "drafter_"):
        if f"{owner}layers" in stats:
            assert stats[f"{owner}slot_bytes"] * 2 == stats[f"{owner}expert_bytes"]
            assert stats[f"{owner}misses"] > 0 and stats[f"{owner}failed_loads"] == 0
    every = layers + drafter_layers
    assert f"offloading {every} of {every} MoE layers: " in server.log.read_text().rpartition("Starting to load")[2]


def test_a_model_that_drafts_for_itself_has_one_store_and_is_believed(
    pairs: dict[str, Pair], plain: EngineServer, server: Server, tmp_path: Path
) -> None:
    """Also where a daemon keeps the experts: two workers of one process, each with slots of its own choice."""
    path, engine, layers, _ = pairs["itself"]
    expected = plain.run(path, engine, ROUNDS)
    accepted = expected["drafts"]["accepted_tokens"]
    assert accepted > 0.9 * expected["drafts"]["draft_tokens"]
    stores = tmp_path / "stores"
    settings = {"cache": "25%", "store": str(stores)}
    with running_daemon(tmp_path / "daemon.sock", 1 << 20, stores) as daemon:
        through = offloading(server, daemon=f"unix:{daemon.socket}", predictor="none", **settings)
        answer = server.engines.run(path, engine | through, ROUNDS)
        check_same(answer, expected)
        stats = answer["stats"][0]
        assert stats["daemon_pid"] == stats["drafter_daemon_pid"] == daemon.pid
        assert stats["layers"] == stats["drafter_layers"] == layers
        (model,) = daemon.status().models
        assert model.stats["resident_bytes"] <= 1 << 20
    assert len([folder for folder in stores.iterdir() if (folder / "records.bin").exists()]) == 1


def test_a_drafters_record_that_cannot_be_read_fails_requests_and_not_the_engine(
    pairs: dict[str, Pair], tmp_path: Path
) -> None:
    """Its drafts would be void, and the KV blocks of its own that the next drafts are made from."""
    path, engine, _, _ = pairs["another MoE model"]
    drafter = engine["speculative_config"]["model"]
    live = LiveEngine(tmp_path / "log")
    try:
        live.start(path, engine, cache="50%", store=str(tmp_path / "stores"), predictor="none")
        (store,) = (info.path for info in StoreRoot(tmp_path / "stores").ls() if info.model == drafter)
        (store / "records.bin").write_bytes(bytes((store / "records.bin").stat().st_size))
        (answer,) = live.generate([[1, 2, 3]], 8)
        assert answer.finish_reason == "error" and str(store) in str(answer.stop_reason)
        assert live.stats()["drafter_failed_loads"] > 0
        live.close()
    finally:
        live.process.kill()
        live.process.join()
