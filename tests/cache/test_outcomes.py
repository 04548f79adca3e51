"""How much of a pool streams and speculative loads may take, and that each of the latter ends in exactly one way."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.cache.outcomes import SpeculativeLoads, speculative_room, stream_share

N = 12
expert_sets = st.sets(st.integers(0, N - 1)).map(lambda ids: np.array(sorted(ids), dtype=np.int64))
OUTCOMES = ["start", "use", "evict", "cancel"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OUTCOMES), expert_sets, expert_sets), max_size=30))
def test_every_speculative_load_ends_once(script: list) -> None:
    loads, open_now = SpeculativeLoads(), set()
    started = ended = 0
    for what, experts, others in script:
        ids = set(experts.tolist())
        assert loads.includes_any(experts) == bool(open_now & ids)
        if what == "start":
            experts = np.array(sorted(ids - open_now), dtype=np.int64)
            loads.start(experts)
            started += len(experts)
            open_now |= ids
        elif what == "use":
            but = set(others.tolist())
            count = loads.use(experts, but)
            assert count == len(open_now & (ids - but))
            open_now -= ids - but
            ended += count
        elif what == "evict":
            count = loads.evict(experts)
            assert count == len(open_now & ids)
            open_now -= ids
            ended += count
        else:
            for expert in ids:
                ended += expert in open_now
                loads.cancel(expert)
            open_now -= ids
        assert loads.unused.tolist() == sorted(open_now)
    assert ended + loads.finish() == started
    assert not len(loads.unused)


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(1, 40), st.integers(0, 40))
def test_speculative_loads_leave_room_for_a_whole_layer(capacity: int, experts: int, in_flight: int) -> None:
    room = speculative_room(capacity, experts, in_flight)
    assert room >= 0
    assert room == 0 or 2 * (in_flight + room) + experts <= capacity


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(1, 40))
def test_a_stream_has_two_layers_where_the_pool_has(capacity: int, experts: int) -> None:
    assert stream_share(capacity, experts) == min(2 * experts, capacity)
