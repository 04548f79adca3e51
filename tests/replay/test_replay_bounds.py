from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.cache import POLICY_NAMES, create_policy
from vllm_moe_offload.replay.bounds import (
    access_sequence,
    belady_miss_rate,
    lru_per_layer_miss_rate,
    perfect_forecast,
)
from vllm_moe_offload.replay.schedule import steps
from vllm_moe_offload.replay.simulate import simulate


def fewest_misses(sequence, slots):
    """By trying everything: the fewest loads that any choice of victims needs."""
    states = {frozenset(): 0}
    for group in sequence:
        following = {}
        for resident, misses in states.items():
            missing = set(group) - resident
            together = resident | missing
            excess = max(0, len(together) - slots)
            for victims in combinations(sorted(together - set(group)), excess):
                kept = together - set(victims)
                following[kept] = min(following.get(kept, 10**9), misses + len(missing))
        states = following
    return min(states.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=2), min_size=1, max_size=9), st.integers(2, 4))
def test_belady_is_the_best_there_is(groups, slots):
    sequence = [sorted(group) for group in groups]
    uses = sum(map(len, sequence))
    assert belady_miss_rate(sequence, slots) * uses == pytest.approx(fewest_misses(sequence, slots))


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_no_policy_beats_belady(short, policy):
    layer_of = np.repeat(np.arange(24), 32)
    tally = simulate(short, steps(short), 192, create_policy(policy, layer_of))
    best = belady_miss_rate(access_sequence(short, steps(short)), 192)
    assert tally.accesses == short.experts.size
    assert best <= tally.demand_miss_rate < 0.8
    assert tally.loads_per_use == tally.demand_miss_rate


def test_lru_per_layer_on_a_sequence_worked_by_hand():
    # Two layers with one slot each: layer 0 uses 0, 0, 1; layer 1 uses 8, 9, 9.
    sequence = [[0], [8], [0], [9], [1], [9]]
    assert lru_per_layer_miss_rate(sequence, 2, 2) == pytest.approx(4 / 6)
    assert lru_per_layer_miss_rate(sequence, 4, 2) == pytest.approx(4 / 6)
    assert lru_per_layer_miss_rate([], 2, 2) == 0


def test_perfect_prediction_leaves_only_what_nothing_can_run_before(short):
    policy = create_policy("lfu", np.repeat(np.arange(24), 32))
    tally = simulate(short, steps(short), 192, policy, perfect_forecast(short, (1, 2)), 0.5)
    first_layer_uses = short.num_tokens * 4
    assert tally.demand_loads <= first_layer_uses
    assert tally.wasted == 0 and tally.useful == tally.prefetch_loads
