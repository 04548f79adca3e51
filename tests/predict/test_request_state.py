"""What a request remembers of itself does not depend on when it is asked."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.predict.base import FREQUENCY_HALF_LIFE, RequestState, TokenMap, TokenMemory

SHAPE = (3, 10, 2)


def maps_of(count: int, seed: int) -> list[TokenMap]:
    rng = np.random.default_rng(seed)
    experts = rng.permuted(np.tile(np.arange(10), (count, 3, 1)), axis=2)[:, :, :2].astype(np.uint8)
    return [TokenMap(one, np.full((3, 2), 0.5, np.float16)) for one in experts]


@settings(max_examples=50, deadline=None)
@given(asked=st.sets(st.integers(0, 199)), count=st.integers(1, 200), seed=st.integers(0, 5))
def test_frequency_is_the_decayed_share_of_tokens_however_rarely_it_is_asked_for(
    asked: set[int], count: int, seed: int
) -> None:
    state = RequestState(SHAPE, None, TokenMemory())
    decay = 0.5 ** (1 / FREQUENCY_HALF_LIFE)
    expected = np.zeros(SHAPE[:2])
    for number, token_map in enumerate(maps_of(count, seed)):
        state.advance(number, token_map)
        expected *= decay
        for layer in range(3):
            expected[layer, token_map.experts[layer]] += 1 - decay
        if number in asked:
            np.testing.assert_allclose(state.context().frequency, expected, atol=1e-5)
    np.testing.assert_allclose(state.context().frequency, expected, atol=1e-5)


def test_a_context_stays_as_it_was_taken() -> None:
    state = RequestState(SHAPE, None, TokenMemory())
    first, second = maps_of(2, seed=1)
    state.advance(7, first)
    before = state.context()
    taken = before.frequency.copy()
    state.advance(8, second)
    assert not np.array_equal(state.context().frequency, taken)
    np.testing.assert_array_equal(before.frequency, taken)
    assert before.previous is first and before.previous_token == 7
