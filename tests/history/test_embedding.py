import numpy as np

from vllm_moe_offload.history.embedding import mean_embedding, unit


def test_the_order_of_tokens_and_the_length_of_the_prompt_do_not_matter():
    vectors = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float16)
    embedding = mean_embedding(vectors)
    assert abs(np.linalg.norm(embedding) - 1) < 1e-6
    assert np.allclose(mean_embedding(np.concatenate([vectors[::-1]] * 3)), embedding, atol=1e-3)


def test_nothing_has_no_direction():
    assert not mean_embedding(np.zeros((0, 4))).any() and not unit(np.zeros(4)).any()
