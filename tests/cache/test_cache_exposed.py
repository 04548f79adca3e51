"""Slots that somebody may be reading without a pin: never given away, and only as many leave as are needed."""

from copy import deepcopy

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.cache import POLICY_NAMES, ExpertCache, create_policy
from vllm_moe_offload.cache.cache import ABSENT, FREE

LAYERS, EXPERTS = 4, 8
N = LAYERS * EXPERTS
LAYER_OF = np.repeat(np.arange(LAYERS), EXPERTS)
of_a_layer = st.tuples(st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1), min_size=1)).map(
    lambda drawn: np.array([drawn[0] * EXPERTS + expert for expert in sorted(drawn[1])])
)


@st.composite
def caches(draw: st.DrawFn) -> ExpertCache:
    """With some experts resident, pinned, retired, transient and exposed; free slots are not exposed."""
    cache = ExpertCache(LAYER_OF, N, create_policy(draw(st.sampled_from(POLICY_NAMES)), LAYER_OF), at_home=True)
    cache.limit = draw(st.integers(1, N))
    for experts in draw(st.lists(of_a_layer, max_size=6)):
        if draw(st.booleans()):
            cache.release((got := cache.stream_ahead(experts, 2 * EXPERTS)).slots[got.slots != ABSENT])
        elif len(experts) <= cache.limit:
            cache.release(cache.acquire(experts).slots)
    cache.retire(draw(st.integers(0, 6)))
    occupied = np.flatnonzero(cache.expert_of != FREE)
    cache.exposed[occupied] = draw(st.lists(st.booleans(), min_size=len(occupied), max_size=len(occupied)))
    pinned = [slot for slot in occupied.tolist() if slot not in cache.retired and draw(st.booleans())]
    cache.pins[pinned] += 1
    cache.limit = draw(st.integers(1, N))
    return cache


@settings(max_examples=150, deadline=None)
@given(caches(), of_a_layer, st.sampled_from(["acquire", "stream", "admit"]))
def test_no_exposed_slot_is_given_away(cache: ExpertCache, experts: np.ndarray, how: str) -> None:
    exposed, pinned = cache.exposed.copy(), cache.pins > 0
    try:
        got = {
            "acquire": lambda: cache.acquire(experts, use=False),
            "stream": lambda: cache.stream_ahead(experts, EXPERTS),
            "admit": lambda: cache.admit(experts),
        }[how]()
    except ValueError:
        missing = np.count_nonzero(cache.slot_of[experts] == ABSENT)
        guarded = cache.slot_of[experts]
        cache.pins[guarded[guarded != ABSENT]] += 1
        assert missing > cache.available
        return
    assert not exposed[got.missing_slots].any() and not pinned[got.missing_slots].any()
    cache.check_integrity()


@settings(max_examples=150, deadline=None)
@given(caches(), of_a_layer)
def test_as_many_retire_as_are_lacking_and_no_more_while_they_are_waited_for(
    cache: ExpertCache, experts: np.ndarray
) -> None:
    resident = cache.slot_of[experts[cache.slot_of[experts] != ABSENT]]
    lacking = len(experts) - len(resident)
    newly = cache.retire_for(experts)
    assert len(newly) <= lacking and not set(newly.tolist()) & set(experts.tolist())
    assert len(cache.retire_for(experts)) == 0, "those that leave already are counted on"
    cache.check_integrity()
    cache.exposed[list(cache.retired)] = False
    cache.pins[resident] += 1
    unpinned = np.count_nonzero((cache.expert_of != FREE) & (cache.pins == 0))
    room = max(0, cache.limit - cache.occupied)
    cache.pins[resident] -= 1
    if lacking <= unpinned + room:
        assert (cache.acquire(experts, use=False).slots != ABSENT).all()


@settings(max_examples=150, deadline=None)
@given(caches(), of_a_layer, st.integers(1, 2 * EXPERTS))
def test_a_prefill_lets_its_own_leave_first_and_no_more_than_it_can_use(
    cache: ExpertCache, experts: np.ndarray, share: int
) -> None:
    idle = cache.transient & (cache.pins == 0) & (cache.expert_of != FREE)
    idle[cache.slot_of[experts[cache.slot_of[experts] != ABSENT]]] = False
    leaving = ~cache.exposed | np.isin(np.arange(N), list(cache.retired))
    newly = cache.slot_of[cache.retire_for(experts, share)]
    assert len(newly) <= np.count_nonzero(cache.slot_of[experts] == ABSENT)
    others = newly[~idle[newly]]
    assert len(others) == 0 or set(np.flatnonzero(idle & ~leaving)) <= set(newly.tolist())
    missing = np.count_nonzero(cache.slot_of[experts] == ABSENT)
    free = min(missing, max(0, cache.limit - cache.occupied))
    transient = np.count_nonzero(cache.transient)
    assert len(others) <= max(0, share - transient - free)
    assert len(cache.retire_for(experts, share)) == 0, "those that leave already are counted on"
    cache.exposed[list(cache.retired)] = False
    unread = deepcopy(cache)
    unread.exposed[:] = False
    placed = cache.stream_ahead(experts, share).slots != ABSENT
    assert (placed == (unread.stream_ahead(experts, share).slots != ABSENT)).all(), "enough were told to leave"
    assert np.count_nonzero(cache.transient) <= max(share, transient + free)
    cache.check_integrity()


@settings(max_examples=150, deadline=None)
@given(caches(), of_a_layer)
def test_beyond_the_limit_there_is_a_slot_for_everyone(cache: ExpertCache, experts: np.ndarray) -> None:
    exposed, occupied = cache.exposed.copy(), cache.occupied
    missing = np.count_nonzero(cache.slot_of[experts] == ABSENT)
    available = cache.available
    got = cache.acquire(experts, use=False, beyond_limit=True)
    assert (got.slots != ABSENT).all() and not exposed[got.missing_slots].any()
    assert len(got.evicted) <= available
    assert cache.occupied <= max(occupied, cache.limit) + missing
    cache.check_integrity()
