"""The mean of a prompt's token embeddings: the same however it is summed, and bounded in memory."""

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.trace.prompt_embedding import CHUNK_TOKENS, mean_embedding, unit

TABLE = np.random.default_rng(0).standard_normal((2000, 16)).astype(np.float32)


def rows(tokens: np.ndarray) -> np.ndarray:
    return TABLE[tokens]


@given(st.lists(st.integers(0, len(TABLE) - 1), max_size=3000), st.integers(0, 2**32 - 1))
def test_it_is_the_mean_of_all_tokens_in_any_order(prompt: list[int], seed: int) -> None:
    tokens = np.array(prompt, np.int32)
    mean = TABLE[tokens].astype(np.float64).sum(axis=0)
    expected = mean / np.linalg.norm(mean) if prompt else np.zeros(16)
    embedding = mean_embedding(tokens, rows)
    assert embedding.dtype == np.float32
    assert np.allclose(embedding, expected, atol=1e-4)
    shuffled = np.random.default_rng(seed).permutation(tokens)
    assert np.array_equal(mean_embedding(shuffled, rows), embedding)


def test_memory_does_not_grow_with_the_prompt() -> None:
    prompt = np.arange(20 * CHUNK_TOKENS)
    asked: list[int] = []

    def wide(tokens: np.ndarray) -> np.ndarray:
        asked.append(len(tokens))
        return np.ones((len(tokens), 1024), np.float32)

    tracemalloc.start()
    mean_embedding(prompt, wide)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(asked) == len(prompt)
    assert peak < 3 * CHUNK_TOKENS * 1024 * 4


def test_nothing_has_no_direction() -> None:
    assert mean_embedding(np.zeros(0, np.int32), rows).tolist() == [0] * 16
    assert not unit(np.zeros(4)).any()
