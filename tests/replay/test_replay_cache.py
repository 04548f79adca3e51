import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.cache import POLICY_NAMES, create_policy
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.replay.replay_cache import ReplayCache, Tally

LAYERS, EXPERTS = 3, 6


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(POLICY_NAMES),
    st.integers(12, 18),
    st.lists(
        st.tuples(
            st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=3), min_size=3, max_size=3),
            st.lists(st.sets(st.integers(0, 5), max_size=3), min_size=3, max_size=3),
        ),
        max_size=12,
    ),
)
def test_the_books_balance_whatever_is_speculated(policy, slots, passes):
    cache = ReplayCache(LAYERS, EXPERTS, slots, create_policy(policy, np.repeat(np.arange(LAYERS), EXPERTS)))
    uses, tally = 0, Tally()
    for used, speculated in passes:
        cache.begin_step()
        for layer in range(LAYERS):
            ids = np.array(sorted(used[layer])) + layer * EXPERTS
            missing, pinned, report = cache.use(layer, ids)
            tally.add(report)
            uses += len(ids)
            assert not cache.absent(layer)[ids - layer * EXPERTS].any()
            assert set(missing.tolist()) <= set(ids.tolist())
            if layer + 1 < LAYERS:
                speculative = np.array(sorted(speculated[layer]), np.int64) + (layer + 1) * EXPERTS
                tally.add(cache.prefetch(layer + 1, speculative)[1])
            cache.cache.check_integrity()
            cache.release(pinned)
    assert not cache.cache.pins.any()
    tally.add(cache.finish())
    assert tally.accesses == uses
    assert tally.useful + tally.late + tally.wasted == tally.prefetch_loads


def test_a_speculative_load_is_not_lost_before_its_layer_runs():
    cache = ReplayCache(2, 8, 20, create_policy("lru", np.repeat([0, 1], 8)))
    cache.begin_step()
    _, pinned, _ = cache.use(0, np.array([0, 1]))
    cache.prefetch(1, np.array([8, 9]))
    cache.release(pinned)
    _, pinned, _ = cache.use(0, np.arange(2, 8))
    cache.release(pinned)
    missing, _, report = cache.use(1, np.array([8, 9]))
    assert len(missing) == 0 and report.useful == 2


def test_too_few_slots_for_a_step_are_refused():
    cache = ReplayCache(2, 8, 3, create_policy("lfu", np.repeat([0, 1], 8)))
    with pytest.raises(ConfigError, match="slots: 3 are too few"):
        cache.use(0, np.arange(4))


def test_a_speculative_load_taken_back_leaves_no_trace():
    cache = ReplayCache(2, 8, 20, create_policy("lru", np.repeat([0, 1], 8)))
    tally = Tally()
    tally.add(cache.prefetch(1, np.array([8, 9]))[1])
    tally.add(cache.withdraw(1, [8]))
    missing, pinned, report = cache.use(1, np.array([8, 9]))
    tally.add(report)
    assert missing.tolist() == [8]
    cache.release(pinned)
    assert not cache.cache.pins.any()
    tally.add(cache.finish())
    assert (tally.prefetch_loads, tally.useful, tally.wasted, tally.demand_loads) == (1, 1, 0, 1)


def test_a_long_prefill_leaves_alone_what_decoding_keeps():
    cache = ReplayCache(4, 8, 24, create_policy("lfu", np.repeat(range(4), 8)))
    tally = Tally()
    for layer in range(4):
        _, pinned, report = cache.use(layer, np.array([0, 1]) + 8 * layer)
        cache.release(pinned)
        tally.add(report)
    for layer in range(4):
        _, pinned, report = cache.stream(layer, np.arange(8) + 8 * layer)
        cache.release(pinned)
        tally.add(report)
    missing, _, report = cache.use(3, np.array([24, 25]))
    tally.add(report)
    assert len(missing) == 0
    assert tally.accesses == 8 + 32 + 2 and tally.demand_loads == 8 + 4 * 6
