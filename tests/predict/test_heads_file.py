import numpy as np
import pytest

from vllm_moe_offload.errors import TraceError
from vllm_moe_offload.predict.base import ModelShape
from vllm_moe_offload.predict.heads import HeadsPredictor
from vllm_moe_offload.predict.heads_file import load_heads, save_heads
from vllm_moe_offload.predict.network import NetworkSize, Parameters
from vllm_moe_offload.predict.token_vectors import LearnedVectors, ModelVectors

SHAPE = ModelShape(24, 32, 4)
SIZE = NetworkSize(24, 32, 8, 16, 12)


@pytest.fixture
def heads():
    vectors = LearnedVectors(8)
    vectors.grow(np.array([5, 17, 3]))
    return HeadsPredictor(SHAPE, Parameters.random(SIZE, np.random.default_rng(0)), vectors)


def first_guess(heads, token=17):
    return heads.begin([heads.open().context(token)]).predict(4)


def test_heads_predict_the_same_after_a_restart(tmp_path, heads):
    save_heads(tmp_path / "heads.npz", heads, 1234, "aa")
    loaded, tokens = load_heads(tmp_path / "heads.npz", SHAPE, "aa")
    assert tokens == 1234
    assert np.allclose(first_guess(loaded), first_guess(heads), atol=2e-3)
    assert np.allclose(first_guess(loaded, token=99), first_guess(heads, token=99), atol=2e-3)


def test_what_is_damaged_or_foreign_is_refused_by_name(tmp_path, heads):
    path = tmp_path / "heads.npz"
    save_heads(path, heads, 1234, "aa")
    for shape, fingerprint, words in (
        (SHAPE, "bb", "model 'aa'"),
        (ModelShape(23, 32, 4), "aa", "24 layers"),
    ):
        with pytest.raises(TraceError, match=words):
            load_heads(path, shape, fingerprint)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TraceError, match="not a readable file of heads"):
            load_heads(path, SHAPE, "aa")
    with pytest.raises(TraceError, match="not a readable file of heads"):
        load_heads(tmp_path / "absent.npz", SHAPE, "aa")


def test_heads_trained_on_the_models_vectors_need_them_again(tmp_path):
    table = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    vectors = ModelVectors(lambda tokens: table[tokens], 8)
    heads = HeadsPredictor(SHAPE, Parameters.random(SIZE, np.random.default_rng(0)), vectors)
    save_heads(tmp_path / "heads.npz", heads, 7, "aa")
    with pytest.raises(TraceError, match="vectors of length 8"):
        load_heads(tmp_path / "heads.npz", SHAPE, "aa")
    loaded, _ = load_heads(tmp_path / "heads.npz", SHAPE, "aa", vectors)
    assert np.allclose(first_guess(loaded), first_guess(heads), atol=2e-3)
