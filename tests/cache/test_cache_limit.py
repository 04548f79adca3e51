"""A cache whose limit changes while it runs, whose experts have slots of their own, and which announces who leaves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.cache import POLICY_NAMES, ExpertCache, create_policy
from vllm_moe_offload.cache.cache import ABSENT, FREE

LAYERS, EXPERTS = 4, 8
N = LAYERS * EXPERTS
LAYER_OF = np.repeat(np.arange(LAYERS), EXPERTS)
expert_sets = st.lists(st.integers(0, N - 1), min_size=1, max_size=6, unique=True)
OPERATIONS = ["acquire", "stream", "admit", "step", "limit", "retire", "empty"]
operations = st.lists(st.tuples(st.sampled_from(OPERATIONS), expert_sets, st.integers(0, N)), max_size=60)


def new_cache(limit: int, policy: str = "lfu", at_home: bool = True) -> ExpertCache:
    cache = ExpertCache(LAYER_OF, N, create_policy(policy, LAYER_OF), at_home=at_home)
    cache.limit = limit
    return cache


def shrink(cache: ExpertCache) -> None:
    """Empty what is above the limit, as far as pins allow."""
    surplus = cache.occupied - cache.limit
    if surplus <= 0:
        return
    cache.retire(surplus - len(cache.retired))
    cache.forget(cache.expert_of[list(cache.retired)[:surplus]])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(POLICY_NAMES), st.booleans(), st.integers(1, N), operations)
def test_no_more_slots_are_occupied_than_the_limit_and_pinned_ones_stay(
    policy: str, at_home: bool, limit: int, script: list
) -> None:
    cache = new_cache(limit, policy, at_home)
    held: list[np.ndarray] = []
    for operation, ids, number in script:
        experts = np.array(ids)
        while len(held) > number % 3:
            cache.release(held.pop(0))
        pinned = set(cache.expert_of[cache.pins > 0].tolist())
        occupied = cache.occupied
        if operation == "step":
            cache.begin_step()
        elif operation == "limit":
            cache.limit = number
            shrink(cache)
            assert cache.occupied == min(occupied, max(number, np.count_nonzero(cache.pins)))
        elif operation == "retire":
            candidates = np.count_nonzero((cache.expert_of != FREE) & (cache.pins == 0)) - len(cache.retired)
            chosen = cache.retire(number)
            assert len(chosen) == min(number, candidates)
            assert (cache.slot_of[chosen] != ABSENT).all() and not pinned & set(chosen.tolist())
        elif operation == "empty":
            cache.forget(cache.expert_of[list(cache.retired)])
            assert not cache.retired
        else:
            if operation == "acquire":
                try:
                    got = cache.acquire(experts, use=number % 2 == 0)
                except ValueError:
                    resident = experts[cache.slot_of[experts] != ABSENT]
                    assert len(experts) > max(cache.limit, occupied) - len(pinned - set(resident.tolist()))
                    cache.check_integrity()
                    continue
                assert (got.slots != ABSENT).all()
                held.append(got.slots)
            elif operation == "stream":
                got = cache.stream_ahead(experts, share=6)
                held.append(got.slots[got.slots != ABSENT])
            else:
                got = cache.admit(experts)
                held.append(got.missing_slots)
            assert len(got.missing) == len(got.missing_slots)
            assert (cache.slot_of[experts] == got.slots).all()
            assert (cache.slot_of[got.missing] == got.missing_slots).all()
            assert not pinned & set(got.evicted.tolist())
            assert cache.occupied <= max(occupied, cache.limit)
        cache.check_integrity()


@settings(deadline=None)
@given(st.lists(expert_sets, max_size=30), st.sampled_from(POLICY_NAMES))
def test_with_room_for_all_every_expert_sits_in_its_own_slot(script: list, policy: str) -> None:
    cache = new_cache(N, policy)
    for turn, ids in enumerate(script):
        experts = np.array(ids)
        if turn % 2:
            cache.release(cache.acquire(experts).slots)
        else:
            cache.release(cache.admit(experts).missing_slots)
        resident = np.flatnonzero(cache.slot_of != ABSENT)
        assert (cache.slot_of[resident] == resident).all()
        cache.check_integrity()


@settings(deadline=None)
@given(expert_sets, expert_sets)
def test_an_expert_goes_home_whenever_its_slot_is_free(first: list, second: list) -> None:
    cache = new_cache(6)
    cache.release(cache.acquire(np.array(first)).slots)
    cache.limit = N
    foreign = set(cache.expert_of[cache.expert_of != FREE].tolist())
    taken = set(cache.slot_of[list(foreign)].tolist())
    got = cache.acquire(np.array(second))
    for expert, slot in zip(got.missing.tolist(), got.missing_slots.tolist(), strict=True):
        assert slot == expert or expert in taken
    cache.check_integrity()


def test_a_full_cache_reuses_slots_in_place() -> None:
    cache = new_cache(4)
    for first in range(0, N, 4):
        got = cache.acquire(np.arange(first, first + 4))
        assert set(got.missing_slots.tolist()) == {0, 1, 2, 3}
        cache.release(got.slots)


def test_the_retired_leave_first_in_order_unless_they_are_asked_for() -> None:
    cache = new_cache(6, "lru")
    for expert in range(6):
        cache.release(cache.acquire(np.array([expert])).slots)
    order = cache.retire(2).tolist()
    assert sorted(order) == [0, 1]
    cache.release(cache.acquire(np.array([order[0]])).slots)
    assert cache.acquire(np.array([20])).evicted.tolist() == [order[1]]
    assert cache.acquire(np.array([21])).evicted.tolist() == [2]
    cache.check_integrity()


def test_who_is_told_of_uses_otherwise_does_not_count_them_twice() -> None:
    cache = new_cache(3)
    for expert, uses in ((0, 3), (1, 2), (2, 0)):
        for _ in range(3):
            cache.release(cache.acquire(np.array([expert]), use=False).slots)
        for _ in range(uses):
            cache.policy.use(np.array([expert]))
    assert cache.acquire(np.array([9])).evicted.tolist() == [2]


def test_who_is_to_be_kept_after_all_does_not_leave_first() -> None:
    cache = new_cache(3, "lru")
    for expert in range(3):
        cache.release(cache.acquire(np.array([expert])).slots)
    cache.retire(3)
    cache.keep(np.array([0, 1]))
    assert cache.acquire(np.array([9])).evicted.tolist() == [2]


def test_what_was_moved_home_is_found_there() -> None:
    cache = new_cache(1)
    cache.release(cache.acquire(np.array([3])).slots)
    cache.release(cache.acquire(np.array([5])).slots)
    assert cache.slot_of[5] == 3
    cache.limit = N
    cache.move(5, 5)
    assert cache.slot_of[5] == 5 and cache.expert_of[3] == FREE
    cache.check_integrity()
    with pytest.raises(AssertionError):
        cache.move(5, 5)


def test_what_is_found_in_slots_is_resident_and_what_never_arrived_is_not_whoever_waits_for_it() -> None:
    cache = new_cache(N)
    cache.insert_resident(np.array([3, 4]), np.array([9, 4]))
    assert len(cache.acquire(np.array([3, 4])).missing) == 0
    got = cache.acquire(np.array([3, 7]))
    cache.cancel(got.missing)
    cache.check_integrity()
    assert cache.slot_of[[3, 4, 7]].tolist() == [9, 4, ABSENT]
