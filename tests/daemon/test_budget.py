"""The split of the daemon's memory: bounds hold for whatever is asked, and need moves memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.daemon.budget import Claim, PoolSize, bytes_for, slots_within, split

GIB = 2**30


@st.composite
def claims(draw: st.DrawFn) -> dict[str, Claim]:
    found = {}
    for name in "abcdef"[: draw(st.integers(1, 6))]:
        ceiling = draw(st.integers(1, 200 * GIB))
        attached = draw(st.booleans())
        found[name] = Claim(
            floor=draw(st.integers(0, ceiling)) if attached else 0,
            ceiling=ceiling,
            wanted=draw(st.integers(1, 300 * GIB)) if attached else 0,
            held=draw(st.integers(0, ceiling)),
            pressure=draw(st.floats(0, 1e11)) if attached else 0.0,
        )
    return found


@given(claims(), st.integers(0, 500 * GIB))
def test_floors_ceilings_and_the_budget_hold(asked: dict[str, Claim], budget: int) -> None:
    if sum(claim.floor for claim in asked.values()) > budget:
        with pytest.raises(ValueError, match=f"the budget is {budget}"):
            split(asked, budget)
        return
    given_ = split(asked, budget)
    assert sum(given_.values()) <= budget
    assert all(claim.floor <= given_[name] <= claim.ceiling for name, claim in asked.items())


@given(claims())
def test_nothing_is_left_over_that_someone_in_use_could_take(asked: dict[str, Claim]) -> None:
    budget = sum(claim.floor for claim in asked.values()) + 10 * GIB
    given_ = split(asked, budget)
    unused = budget - sum(given_.values())
    for name, claim in asked.items():
        if claim.wanted:
            assert given_[name] == claim.ceiling or unused <= len(asked)


def test_one_model_alone_gets_all_it_can_use() -> None:
    assert split({"a": Claim(GIB, 40 * GIB, 8 * GIB, 0)}, 30 * GIB) == {"a": 30 * GIB}
    assert split({"a": Claim(GIB, 20 * GIB, 8 * GIB, 0)}, 30 * GIB) == {"a": 20 * GIB}


def test_memory_follows_the_misses_and_the_idle_engine_keeps_a_part() -> None:
    quiet, busy = Claim(GIB, 20 * GIB, 10 * GIB, 0), Claim(GIB, 20 * GIB, 10 * GIB, 0, pressure=1e9)
    given_ = split({"quiet": quiet, "busy": busy}, 10 * GIB)
    assert given_["busy"] > 3 * given_["quiet"] > 3 * GIB
    even = split({"quiet": quiet, "busy": quiet}, 10 * GIB)
    assert even["quiet"] == pytest.approx(even["busy"]) == pytest.approx(5 * GIB)


def test_a_model_nobody_uses_stays_until_others_want_its_memory() -> None:
    left = Claim(0, 20 * GIB, 0, held=8 * GIB)
    assert split({"left": left, "new": Claim(GIB, 20 * GIB, 6 * GIB, 0)}, 16 * GIB) == {
        "left": 8 * GIB,
        "new": 8 * GIB,
    }
    assert split({"left": left, "new": Claim(GIB, 20 * GIB, 14 * GIB, 0)}, 16 * GIB) == {
        "left": 2 * GIB,
        "new": 14 * GIB,
    }
    assert split({"left": left}, 16 * GIB) == {"left": 8 * GIB}


@st.composite
def pools(draw: st.DrawFn) -> list[PoolSize]:
    sizes = []
    for _ in range(draw(st.integers(1, 3))):
        record = draw(st.integers(1, 2**24))
        sizes.append(PoolSize(draw(st.integers(1, 50_000)), record, record + draw(st.sampled_from([0, 1, 8192]))))
    return sizes


@given(pools(), st.integers(0, 2**50))
def test_the_pools_of_a_model_take_no_more_than_it_has(sizes: list[PoolSize], budget: int) -> None:
    slots = slots_within(sizes, budget)
    assert sum(size.taken(count) for size, count in zip(sizes, slots, strict=True)) <= budget
    assert all(0 <= count <= size.experts for size, count in zip(sizes, slots, strict=True))


@given(pools(), st.data())
def test_bytes_for_slots_are_enough_and_the_least(sizes: list[PoolSize], data: st.DataObject) -> None:
    wanted = [data.draw(st.integers(1, size.experts)) for size in sizes]
    needed = bytes_for(sizes, wanted)
    assert all(have >= want for have, want in zip(slots_within(sizes, needed), wanted, strict=True))
    assert any(have < want for have, want in zip(slots_within(sizes, needed - 1), wanted, strict=True))
