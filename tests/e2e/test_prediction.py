"""Prediction in a running engine: the same tokens, loads that were of use, and a history that outlives the engine."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.engines import EngineServer
from vllm_moe_offload.learning.heads_file import HEADS_FILE
from vllm_moe_offload.learning.process import TrainingJob, train
from vllm_moe_offload.trace.trace_file import read_trace


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 8192) for _ in range(draw.randint(1, 60))] for _ in range(count)]


EXAMPLES = Path(__file__).parents[2] / "examples"
PAST = [{"prompts": prompts(12, seed=1), "tokens": 48}]
ROUNDS = [{"prompts": prompts(1, seed=seed), "tokens": 40} for seed in (2, 3)] + [
    {"prompts": prompts(5, seed=4), "tokens": 12}
]
ENGINE = {"enforce_eager": True, "dtype": "bfloat16"}


def run(
    server: EngineServer, model: Path, rounds: list[dict[str, Any]] = ROUNDS, **settings: Any
) -> tuple[list[Any], dict[str, Any]]:
    offload = {"moe_offload": {"cache": "25%"} | settings}
    answer = server.run(model, ENGINE | {"additional_config": offload}, rounds, every_step=True)
    return answer["rounds"], answer["stats"][0]


@pytest.fixture(scope="module")
def past(tiny_moe: Path, offloaded: EngineServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The histories folder of an engine that has served some requests."""
    folder = tmp_path_factory.mktemp("past")
    run(offloaded, tiny_moe, PAST, predictor="frequency", history=str(folder))
    return folder


@pytest.fixture(scope="module")
def expected(tiny_moe: Path, plain: EngineServer) -> list[Any]:
    return plain.run(tiny_moe, ENGINE, ROUNDS)["rounds"]


def fresh(past: Path, folder: Path) -> Path:
    """A copy of the past, and the one history in it."""
    shutil.copytree(past, folder / "history")
    (history,) = (folder / "history").glob("*/history.npz")
    return history


def settled(stats: dict[str, Any]) -> int:
    return stats["prefetch_useful"] + stats["prefetch_late"] + stats["prefetch_wasted"]


@pytest.mark.parametrize("predictor", ["history", "finemoe", "moe-infinity", "coactivation", "frequency"])
def test_tokens_stay_the_same_and_some_guesses_are_right(
    tiny_moe: Path, offloaded: EngineServer, past: Path, expected: list[Any], tmp_path: Path, predictor: str
) -> None:
    history = fresh(past, tmp_path)
    rounds, stats = run(offloaded, tiny_moe, predictor=predictor, history=str(history.parent.parent))
    assert rounds == expected
    assert stats["prefetches"] > 0 and stats["prefetch_useful"] + stats["prefetch_late"] > 0
    assert settled(stats) <= stats["prefetches"] and stats["failed_loads"] == 0


def test_classes_from_outside_serve_the_same_tokens(
    tiny_moe: Path, past: Path, expected: list[Any], tmp_path: Path
) -> None:
    path = f"{EXAMPLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    server = EngineServer(tmp_path / "log", PYTHONPATH=path)
    settings = {"predictor": "previous_token:PreviousToken", "policy": "lru_2:LeastRecentlyUsedTwice"}
    try:
        rounds, stats = run(server, tiny_moe, **settings, history=str(fresh(past, tmp_path).parent.parent))
    finally:
        server.close()
    assert rounds == expected
    assert stats["prefetches"] > 0 and stats["prefetch_useful"] + stats["prefetch_late"] > 0
    assert stats["prediction_failures"] == 0 and stats["failed_loads"] == 0


def test_without_a_predictor_nothing_is_guessed_or_kept(
    tiny_moe: Path, offloaded: EngineServer, past: Path, expected: list[Any], tmp_path: Path
) -> None:
    history = fresh(past, tmp_path)
    before = history.read_bytes()
    rounds, stats = run(offloaded, tiny_moe, predictor="none", history=str(history.parent.parent))
    assert rounds == expected and stats["prefetches"] == 0 and history.read_bytes() == before


def test_the_history_grows_by_every_request_and_is_found_again(
    tiny_moe: Path, offloaded: EngineServer, past: Path, tmp_path: Path
) -> None:
    history = fresh(past, tmp_path)
    before = read_trace(history)
    assert before.num_requests == len(PAST[0]["prompts"]) and before.embeddings is not None
    run(offloaded, tiny_moe, predictor="history", history=str(history.parent.parent))
    after = read_trace(history)
    assert after.num_requests == before.num_requests + sum(len(given["prompts"]) for given in ROUNDS)
    np.testing.assert_array_equal(after.experts[: before.num_tokens], before.experts)
    assert after.fingerprint == before.fingerprint == history.parent.name


def test_a_history_that_is_off_leaves_no_file(tiny_moe: Path, offloaded: EngineServer, tmp_path: Path) -> None:
    settings = {"predictor": "history", "history": "off", "store": str(tmp_path / "stores")}
    run(offloaded, tiny_moe, ROUNDS[:1], **settings)
    assert not (tmp_path / "history").exists()
    run(offloaded, tiny_moe, ROUNDS[:1], **settings | {"history": None})
    assert len(list((tmp_path / "history").glob("*/history.npz"))) == 1, "beside the stores when nobody says where"


def test_what_is_damaged_is_set_aside_and_the_engine_starts_empty(
    tiny_moe: Path, offloaded: EngineServer, past: Path, expected: list[Any], tmp_path: Path
) -> None:
    history = fresh(past, tmp_path)
    whole = history.read_bytes()
    history.write_bytes(whole[: len(whole) // 2])
    heads = history.with_name(HEADS_FILE)
    heads.write_bytes(b"no heads")
    rounds, _ = run(offloaded, tiny_moe, predictor="history", history=str(history.parent.parent))
    assert rounds == expected
    (aside,) = history.parent.glob("history.npz.unusable-*")
    assert aside.read_bytes() == whole[: len(whole) // 2]
    (aside,) = history.parent.glob(f"{HEADS_FILE}.unusable-*")
    assert aside.read_bytes() == b"no heads"
    assert read_trace(history).num_requests == sum(len(given["prompts"]) for given in ROUNDS)


def test_heads_learned_from_the_history_predict_after_a_restart(
    tiny_moe: Path, offloaded: EngineServer, past: Path, expected: list[Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file as load_tensors

    history = fresh(past, tmp_path)
    embeddings = load_tensors(tiny_moe / "model.safetensors")["model.embed_tokens.weight"].float().numpy()
    vectors = tmp_path / "vectors.npz"
    np.savez(vectors, tokens=np.arange(len(embeddings)), rows=embeddings)
    heads = history.with_name(HEADS_FILE)
    train(TrainingJob(str(history), str(heads), history.parent.name, str(vectors), 1.0, os.getppid()))
    made = heads.read_bytes()
    rounds, stats = run(offloaded, tiny_moe, predictor="history", history=str(history.parent.parent))
    assert rounds == expected and heads.read_bytes() == made
    assert stats["prefetch_useful"] + stats["prefetch_late"] > settled(stats) / 3, "chance gives a sixteenth"
