"""Heads are learned in another process, found again at the next start, and never believed when damaged."""

from pathlib import Path

import numpy as np
import pytest

from vllm_moe_offload.chronicle.heads_file import HEADS_FILE, read_heads, write_heads
from vllm_moe_offload.chronicle.keeper import HistoryKeeper
from vllm_moe_offload.chronicle.learning import Learning
from vllm_moe_offload.chronicle.predictors import create_predictor
from vllm_moe_offload.errors import TraceError
from vllm_moe_offload.history.archive import HistoryArchive
from vllm_moe_offload.history.store import HistoryStore
from vllm_moe_offload.history.trace import Trace
from vllm_moe_offload.predict.base import ModelShape
from vllm_moe_offload.predict.history import HistoryPredictor
from vllm_moe_offload.predict.network import NetworkSize, Parameters
from vllm_moe_offload.predict.token_vectors import LearnedVectors, ModelVectors, TokenVectors

SHAPE = ModelShape(3, 8, 2)
SIZE = NetworkSize(3, 8, 16)


def request(tokens: int, seed: int = 0) -> Trace:
    """A request in which the token alone says where it goes."""
    read = np.random.default_rng(seed).integers(0, 4, tokens).astype(np.int32)
    experts = np.stack([np.stack([2 * read, 2 * read + 1], axis=1)] * SHAPE.layers, axis=1).astype(np.uint8)
    weights = np.full(experts.shape, 0.5, np.float16)
    return Trace(experts, weights, np.array([0, tokens]), SHAPE.experts, tokens=read)


def embed(tokens: np.ndarray) -> np.ndarray:
    return np.eye(16, dtype=np.float32)[tokens]


def predictor(vectors: TokenVectors | None) -> HistoryPredictor:
    made = create_predictor("history", SHAPE, HistoryStore(SHAPE), vectors)
    assert isinstance(made, HistoryPredictor)
    return made


@pytest.mark.parametrize("vectors", [None, ModelVectors(embed, 16)], ids=["learned", "the model's"])
def test_heads_are_learned_beside_the_engine_and_found_at_the_next_start(
    tmp_path: Path, vectors: TokenVectors | None
) -> None:
    said: list[str] = []
    young = predictor(vectors)
    learning = Learning(young, tmp_path / "kept", "ab", vectors, None, said.append)
    learning.attend()
    assert learning._process is None, "there is nothing to learn from"
    young.history.add(request(600))
    learning.attend()
    assert learning._process is not None and young.heads is None
    assert learning._process.wait(120) == 0
    learning.attend()
    assert young.heads is not None and young.trained_tokens == 600 and not young.training_due
    learning.close()

    restarted = predictor(vectors)
    Learning(restarted, tmp_path / "kept", "ab", vectors, None, said.append).close()
    step = restarted.begin([restarted.open().context(2)])
    np.testing.assert_array_equal(np.argsort(-step.predict(0)[0])[:2] // 2, [2, 2])
    assert restarted.trained_tokens == 600 and "heads learned from 600 tokens" in said[-1]


def test_a_training_that_fails_is_reported_once(tmp_path: Path) -> None:
    young = predictor(None)
    learning = Learning(young, tmp_path / "kept", "ab", None, None, print)
    young.history.add(request(600))
    learning.attend()
    assert learning._process is not None
    learning._process.terminate()
    learning._process.wait(60)
    with pytest.raises(RuntimeError, match="learning from the history ended with -15"):
        learning.attend()
    learning.attend()
    assert learning._process is None and young.heads is None
    learning.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: write_heads(path, "another", Parameters(SIZE), LearnedVectors(16), 1),
        lambda path: write_heads(path, "ab", Parameters(SIZE._replace(experts=9)), LearnedVectors(16), 1),
        lambda path: write_heads(path, "ab", Parameters(SIZE), ModelVectors(embed, 16), 1),
    ],
    ids=["cut", "empty", "another model", "another shape", "other vectors"],
)
def test_heads_that_do_not_fit_are_set_aside_by_name(tmp_path: Path, damage) -> None:
    path = tmp_path / HEADS_FILE
    write_heads(path, "ab", Parameters(SIZE), LearnedVectors(16), 1)
    read_heads(path, "ab", SIZE, learned=True)
    damage(path)
    with pytest.raises(TraceError, match=r"heads\.npz: not heads of this model"):
        read_heads(path, "ab", SIZE, learned=True)
    said: list[str] = []
    young = predictor(None)
    Learning(young, tmp_path, "ab", None, None, said.append).close()
    assert young.heads is None and not path.exists() and len(list(tmp_path.glob(f"{HEADS_FILE}.unusable-*"))) == 1
    assert "learned anew" in said[0] and str(path) in said[0]


def test_a_history_is_written_when_it_has_grown_and_only_by_its_keeper(tmp_path: Path) -> None:
    archive = HistoryArchive(tmp_path)
    keeper = HistoryKeeper(archive, "ab", SHAPE, print)
    keeper.save(at_once=True)
    assert not archive.path("ab").exists()
    keeper.history.add(request(5))
    keeper.save()
    assert not archive.path("ab").exists(), "not so soon after the start"
    keeper.save(at_once=True)
    reader = HistoryKeeper(archive, "ab", SHAPE, print, writes=False)
    assert reader.history.num_tokens == 5
    reader.history.add(request(7, seed=1))
    reader.save(at_once=True)
    assert HistoryKeeper(archive, "ab", SHAPE, print).history.num_tokens == 5
