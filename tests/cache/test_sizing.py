"""Slots for a budget: never over it, never under what one token needs, and the advice in the error works."""

import itertools
import math
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.cache.sizing import LayoutNeeds, slots_for_budget
from vllm_moe_offload.config import CacheBudget
from vllm_moe_offload.errors import ConfigError

MIB = 2**20


@st.composite
def models(draw: st.DrawFn) -> dict[str, LayoutNeeds]:
    needs = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        experts = draw(st.integers(1, 50_000))
        size = draw(st.one_of(st.integers(1, 64 * MIB), st.sampled_from([MIB, 3 * MIB, 4096])))
        needs[name] = LayoutNeeds(size, experts, draw(st.integers(1, min(experts, 16))))
    return needs


def total_bytes(needs: dict[str, LayoutNeeds]) -> int:
    return sum(need.total_bytes for need in needs.values())


def everything(needs: dict[str, LayoutNeeds]) -> dict[str, int]:
    return {name: need.experts for name, need in needs.items()}


@given(models(), st.floats(0, 1.5))
def test_a_budget_is_used_and_never_exceeded(needs: dict[str, LayoutNeeds], share: float) -> None:
    budget = int(total_bytes(needs) * share)
    if budget < sum(need.minimum_bytes for need in needs.values()):
        with pytest.raises(ConfigError):
            slots_for_budget(needs, budget, "it")
        return
    slots = slots_for_budget(needs, budget, "it")
    assert sum(needs[name].record_bytes * count for name, count in slots.items()) <= budget
    for name, need in needs.items():
        assert need.minimum <= slots[name] <= need.experts


@given(models(), st.floats(0, 1))
def test_layouts_above_their_minimum_hold_the_same_share_and_nothing_is_left(
    needs: dict[str, LayoutNeeds], share: float
) -> None:
    budget = max(int(total_bytes(needs) * share), sum(need.minimum_bytes for need in needs.values()))
    slots = slots_for_budget(needs, budget, "it")
    for one, other in itertools.permutations(needs, 2):
        if slots[other] > needs[other].minimum:
            fraction = Fraction(slots[other], needs[other].experts)
            assert fraction < Fraction(slots[one] + 1, needs[one].experts), "each is rounded down by less than a slot"
    left = budget - sum(needs[name].record_bytes * count for name, count in slots.items())
    assert left < sum(need.record_bytes for need in needs.values()) or slots == everything(needs)


def test_a_small_model_beside_a_large_one_gets_what_one_token_needs() -> None:
    """A budget that is plenty for both must not be refused because a small model's share is below one token's need."""
    needs = {"60 layers": LayoutNeeds(1000, 60 * 256, 8), "one layer": LayoutNeeds(1000, 256, 8)}
    slots = slots_for_budget(needs, 1000 * 200, "it")
    assert slots == {"60 layers": 192, "one layer": 8}


@given(models())
def test_a_budget_of_everything_holds_everything(needs: dict[str, LayoutNeeds]) -> None:
    for budget in (total_bytes(needs), total_bytes(needs) + 1, 10 * total_bytes(needs)):
        assert slots_for_budget(needs, budget, "it") == everything(needs)


@given(st.integers(1, 50_000), st.data())
def test_a_budget_of_so_many_records_gives_so_many_slots(experts: int, data: st.DataObject) -> None:
    slots, size = data.draw(st.integers(1, experts)), data.draw(st.integers(1, 64 * MIB))
    assert slots_for_budget({"a": LayoutNeeds(size, experts, 1)}, slots * size, "it") == {"a": slots}


@given(models())
def test_what_the_error_advises_works(needs: dict[str, LayoutNeeds]) -> None:
    with pytest.raises(ConfigError, match=r"cache = '1B' gives 1 B, too little to hold") as caught:
        slots_for_budget(needs | {"small": LayoutNeeds(2, 2, 1)}, 1, "cache = '1B'")
    advised = re.search(r"is '(\d+[KM]iB)' \(([\d.]+%)\)", str(caught.value))
    assert advised is not None
    needs = needs | {"small": LayoutNeeds(2, 2, 1)}
    size, share = CacheBudget.parse(advised[1]).size, CacheBudget.parse(advised[2]).share
    assert size is not None and share is not None
    slots_for_budget(needs, size, "as advised")
    slots_for_budget(needs, math.ceil(total_bytes(needs) * share), "as advised")
