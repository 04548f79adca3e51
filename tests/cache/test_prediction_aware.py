import numpy as np
import pytest

from vllm_moe_offload.cache import POLICY_NAMES, ExpertCache, create_policy
from vllm_moe_offload.cache.policies import PredictionAwarePolicy

LAYER_OF = np.repeat(np.arange(2), 8)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_without_predictions_the_wrapped_policy_decides(name):
    rng = np.random.default_rng(0)
    plain = ExpertCache(LAYER_OF, 6, create_policy(name, LAYER_OF))
    wrapped = ExpertCache(LAYER_OF, 6, PredictionAwarePolicy(create_policy(name, LAYER_OF), 16))
    for _ in range(60):
        for cache in (plain, wrapped):
            cache.begin_step()
        for layer in range(2):
            ids = np.sort(rng.choice(8, 2, replace=False)) + 8 * layer
            for cache in (plain, wrapped):
                cache.release(cache.acquire(ids).slots)
            ties = plain.policy.keep_scores(plain.expert_of[plain.expert_of >= 0])
            if len(np.unique(ties)) == len(ties):
                assert set(plain.expert_of.tolist()) == set(wrapped.expert_of.tolist())
            else:
                wrapped.slot_of[:], wrapped.expert_of[:] = plain.slot_of, plain.expert_of


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_what_is_about_to_be_used_stays_even_if_it_never_was(name):
    policy = PredictionAwarePolicy(create_policy(name, LAYER_OF), 16)
    cache = ExpertCache(LAYER_OF, 4, policy)
    cache.begin_step()
    cache.release(cache.acquire(np.array([0, 1, 2])).slots)
    cache.release(cache.admit(np.array([9])).missing_slots)
    policy.expected[9] = 0.6
    cache.release(cache.acquire(np.array([3])).slots)
    assert cache.slot_of[9] >= 0


def test_predictions_end_with_the_step():
    policy = PredictionAwarePolicy(create_policy("lfu", LAYER_OF), 16)
    policy.expected[:] = 1
    policy.begin_step()
    assert not policy.expected.any()
