"""Residency under arbitrary sequences of acquisitions, streams, guesses and releases."""

from copy import deepcopy

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_moe_offload.cache import POLICY_NAMES, ExpertCache, create_policy
from vllm_moe_offload.cache.cache import ABSENT, FREE
from vllm_moe_offload.errors import ConfigError

LAYERS, EXPERTS = 4, 8
N = LAYERS * EXPERTS
LAYER_OF = np.repeat(np.arange(LAYERS), EXPERTS)
expert_sets = st.lists(st.integers(0, LAYERS * EXPERTS - 1), min_size=1, max_size=6, unique=True)
operations = st.lists(
    st.tuples(st.sampled_from(["acquire", "stream", "admit", "step"]), expert_sets, st.integers(0, 3)), max_size=40
)


def vars_of(cache: ExpertCache) -> list[object]:
    """Everything but what is learned of uses."""
    arrays = (cache.slot_of, cache.expert_of, cache.pins, cache.transient, cache.exposed)
    return [*(array.tolist() for array in arrays), list(cache.retired), cache.occupied]


@settings(max_examples=150, deadline=None)
@given(policy=st.sampled_from(POLICY_NAMES), slots=st.integers(6, 20), script=operations)
def test_residency_keeps_its_invariants(policy: str, slots: int, script: list) -> None:
    cache = ExpertCache(LAYER_OF, slots, create_policy(policy, LAYER_OF))
    held: list[np.ndarray] = []
    share = slots // 2
    for operation, ids, keep in script:
        experts = np.array(ids)
        pinned = {int(cache.expert_of[slot]) for group in held for slot in group}
        while len(held) > keep:
            cache.release(held.pop(0))
            pinned = {int(cache.expert_of[slot]) for group in held for slot in group}
        if operation == "step":
            cache.begin_step()
            continue
        if operation == "acquire":
            free_for_all = slots - len(pinned)
            if np.count_nonzero(cache.slot_of[experts] == ABSENT) > free_for_all - np.count_nonzero(
                [e not in pinned and cache.slot_of[e] != ABSENT for e in ids]
            ):
                before = cache.slot_of.copy(), cache.pins.copy()
                with pytest.raises(ValueError, match="unpinned"):
                    cache.acquire(experts)
                assert (cache.slot_of == before[0]).all() and (cache.pins == before[1]).all()
                continue
            got = cache.acquire(experts)
            assert (cache.slot_of[experts] == got.slots).all()
            held.append(got.slots)
        elif operation == "stream":
            transient, free = np.count_nonzero(cache.transient), np.count_nonzero(cache.expert_of == FREE)
            kept = cache.expert_of[(cache.expert_of != FREE) & ~cache.transient]
            before = deepcopy(cache)
            whole = cache.stream(experts, share)
            if whole is None:
                assert vars_of(cache) == vars_of(before), "nothing has changed"
            got = whole or cache.stream_ahead(experts, share)
            assert (whole is not None) == ((before.stream_ahead(experts, share).slots != ABSENT).all())
            assert np.count_nonzero(cache.transient) <= max(share, transient + min(free, len(got.missing)))
            lost = np.count_nonzero(cache.slot_of[kept] == ABSENT)
            assert lost <= max(0, share - transient - free), "free slots count towards the share of what may be evicted"
            held.append(got.slots[got.slots != ABSENT])
        else:
            protect = np.array(ids[:1])
            was_resident = cache.slot_of[protect[0]] != ABSENT
            got = cache.admit(experts, protect=protect)
            assert not was_resident or cache.slot_of[protect[0]] != ABSENT
            held.append(got.missing_slots)
        assert not pinned & set(got.evicted.tolist()), "a pinned expert was evicted"
        assert set(got.missing.tolist()) <= set(ids)
        assert len(set(got.slots[got.slots != ABSENT].tolist())) == np.count_nonzero(got.slots != ABSENT)
        cache.check_integrity()


def test_streaming_leaves_the_decode_working_set_in_place() -> None:
    cache = ExpertCache(LAYER_OF, 16, create_policy("lfu", LAYER_OF))
    working_set = np.array([0, 9, 17, 25, 3, 12, 20, 28])
    for _ in range(3):
        cache.begin_step()
        cache.release(cache.acquire(working_set).slots)
    for layer in range(LAYERS):
        got = cache.stream(np.arange(layer * EXPERTS, (layer + 1) * EXPERTS), share=8)
        assert got is not None and (got.slots != ABSENT).all()
        cache.release(got.slots)
    assert (cache.slot_of[working_set] != ABSENT).all()
    assert len(cache.acquire(working_set).missing) == 0


def stream_all(cache: ExpertCache, share: int) -> int:
    """A long prefill: every expert of every layer, one layer ahead of the one that computes. Returns the loads."""
    loads, ahead = 0, np.empty(0, dtype=np.int32)
    for layer in range(LAYERS):
        got = cache.stream(np.arange(layer * EXPERTS, (layer + 1) * EXPERTS), share)
        assert got is not None and (got.slots != ABSENT).all()
        cache.release(ahead)
        following = np.arange((layer + 1) * EXPERTS, min(layer + 2, LAYERS) * EXPERTS)
        started = cache.stream_ahead(following[cache.slot_of[following] == ABSENT], share)
        ahead = started.missing_slots
        loads += len(got.missing) + len(started.missing)
        cache.release(got.slots)
        cache.check_integrity()
    return loads


@settings(deadline=None)
@given(slots=st.integers(2 * EXPERTS, LAYERS * EXPERTS), working_set=st.sets(st.integers(0, N - 1), max_size=EXPERTS))
def test_prefills_keep_what_they_read_in_slots_that_are_free(slots: int, working_set: set[int]) -> None:
    cache = ExpertCache(LAYER_OF, slots, create_policy("lfu", LAYER_OF))
    kept = np.array(sorted(working_set), dtype=np.int64)
    cache.release(cache.acquire(kept).slots)
    share = 2 * EXPERTS
    assume(slots >= share + len(kept))
    stream_all(cache, share)
    assert cache.occupied == slots
    again = stream_all(cache, share)
    assert again <= N - slots + (2 * EXPERTS if slots < N else 0), "a second one reads what is not there"
    assert (cache.slot_of[kept] != ABSENT).all(), "and decoding keeps what it uses"


def test_decoding_takes_back_the_slots_that_a_prefill_found_free() -> None:
    cache = ExpertCache(LAYER_OF, 24, create_policy("lfu", LAYER_OF))
    working_set = np.arange(0, N, 4)
    cache.begin_step()
    cache.release(cache.acquire(working_set).slots)
    stream_all(cache, share=16)
    others = np.arange(1, N, 4)
    cache.release(cache.acquire(others).slots)
    assert (cache.slot_of[working_set] != ABSENT).all()


def test_a_forgotten_expert_is_missing_again() -> None:
    cache = ExpertCache(LAYER_OF, 6, create_policy("lru", LAYER_OF))
    got = cache.acquire(np.array([1, 2]))
    cache.release(got.slots)
    cache.forget(np.array([2]))
    cache.check_integrity()
    assert cache.acquire(np.array([1, 2])).missing.tolist() == [2]


@pytest.mark.parametrize("asked", [[0], [0, 3]])
def test_a_streamed_expert_that_is_used_is_no_longer_the_first_to_go(asked: list[int]) -> None:
    cache = ExpertCache(LAYER_OF, 2 + len(asked), create_policy("lru", LAYER_OF))
    cache.release(cache.stream_ahead(np.array([0, 1]), share=2).slots)
    for experts in ([2], asked):
        cache.release(cache.acquire(np.array(experts)).slots)
    evicted = [cache.acquire(np.array([expert])).evicted.tolist() for expert in (5, 6)]
    assert evicted == [[1], [2]], "what streamed through and was not used, then the least recently used"


def fill(policy: str, uses: list[list[int]], slots: int) -> ExpertCache:
    cache = ExpertCache(LAYER_OF, slots, create_policy(policy, LAYER_OF))
    for experts in uses:
        cache.begin_step()
        cache.release(cache.acquire(np.array(experts)).slots)
    return cache


def test_lru_evicts_the_least_recently_used() -> None:
    cache = fill("lru", [[0], [1], [2], [0]], slots=3)
    assert cache.acquire(np.array([5])).evicted.tolist() == [1]


def test_lfu_evicts_the_least_frequently_used_and_forgets_with_its_half_life() -> None:
    cache = fill("lfu", [[0], [0], [0], [1], [2]], slots=3)
    assert cache.acquire(np.array([5])).evicted.tolist() == [1]
    cache = fill("lfu", [[0]] * 3 + [[1]] * 2 + [[2]] * 100 + [[1]], slots=3)
    assert cache.acquire(np.array([5])).evicted.tolist() == [0]


def test_least_stale_evicts_what_this_pass_has_not_touched_in_layer_order() -> None:
    cache = fill("least-stale", [[3, 11, 19]], slots=4)
    cache.begin_step()
    cache.release(cache.acquire(np.array([0])).slots)
    assert cache.acquire(np.array([8])).evicted.tolist() == [3]
    assert cache.acquire(np.array([16])).evicted.tolist() == [11]


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'mru' is unknown; choose one of lfu, lru, least-stale"):
        create_policy("mru", LAYER_OF)
