"""Slots of device memory for a budget: never above it, no slot left that it could pay for, and advice that works."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.config import CacheBudget
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.windows.plan import WindowPlan
from vllm_moe_offload.windows.sizes import WindowNeeds, bytes_of_everything, plans_for_budget

Needs = dict[str, WindowNeeds]
SIZES = (0, 4, 5760, 7168, 259_200, 65_552, 1_000_001, 2_097_152)


@st.composite
def layouts(draw: st.DrawFn) -> Needs:
    needs = {}
    for name in "ab"[: draw(st.integers(1, 2))]:
        sizes = (*draw(st.lists(st.sampled_from(SIZES), max_size=3)), draw(st.sampled_from(SIZES[1:])))
        layers, most = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 8, 32]))
        experts = draw(st.sampled_from([(most,) * layers, tuple(1 + 7 * layer % most for layer in range(layers))]))
        minimum = tuple(min(count, draw(st.sampled_from([1, 2, 8]))) for count in experts)
        weights = draw(st.sampled_from([experts, tuple(range(1, layers + 1))]))
        needs[name] = WindowNeeds(sizes, experts, minimum, weights)
    return needs


def nbytes(needs: Needs, plans: dict[str, WindowPlan]) -> int:
    return sum(plan.nbytes(needs[name].row_bytes) for name, plan in plans.items())


def slots(plans: dict[str, WindowPlan]) -> list[int]:
    return [count for plan in plans.values() for count in plan.slots]


def smallest(needs: Needs) -> int:
    return nbytes(needs, {name: need.plan(need.minimum) for name, need in needs.items()})


def budget_between(needs: Needs, share: float) -> int:
    least, most = smallest(needs), bytes_of_everything(needs)
    return least + math.ceil((most - least) * share)


@settings(max_examples=150, deadline=None)
@given(layouts(), st.floats(0, 1.2))
def test_a_budget_is_never_exceeded_and_every_layer_has_what_a_token_needs(needs: Needs, share: float) -> None:
    budget = budget_between(needs, share)
    plans = plans_for_budget(needs, budget, "it")
    assert nbytes(needs, plans) <= budget
    for name, need in needs.items():
        assert plans[name].experts == need.experts
        for least, count, most in zip(need.minimum, plans[name].slots, need.experts, strict=True):
            assert least <= count <= most


@settings(max_examples=100, deadline=None)
@given(layouts(), st.floats(0, 1), st.floats(0, 1))
def test_no_layer_has_fewer_slots_of_a_larger_budget(needs: Needs, one: float, other: float) -> None:
    small, large = sorted((budget_between(needs, one), budget_between(needs, other)))
    few, many = slots(plans_for_budget(needs, small, "it")), slots(plans_for_budget(needs, large, "it"))
    assert all(count <= more for count, more in zip(few, many, strict=True))


@settings(max_examples=100, deadline=None)
@given(layouts(), st.floats(0, 1))
def test_layers_above_their_minimum_have_slots_in_proportion_to_their_weights(needs: Needs, share: float) -> None:
    plans = plans_for_budget(needs, budget_between(needs, share), "it")
    windows = [
        window
        for name, need in needs.items()
        for window in zip(plans[name].slots, need.minimum, need.experts, need.weights, strict=True)
    ]
    for count, least, _, weight in windows:
        for other, _, most, other_weight in windows:
            if count > least and other < most:
                assert count / weight <= (other + 1) / other_weight


@settings(max_examples=100, deadline=None)
@given(layouts(), st.floats(0, 1))
def test_the_next_slot_would_not_have_fitted(needs: Needs, share: float) -> None:
    budget = budget_between(needs, share)
    plans = plans_for_budget(needs, budget, "it")
    if nbytes(needs, plans) == bytes_of_everything(needs):
        return
    larger = plans_for_budget(needs, bytes_of_everything(needs), "it")
    assert slots(larger) == [count for need in needs.values() for count in need.experts]
    low, high = budget, bytes_of_everything(needs)
    while high - low > 1:  # the smallest budget that gives more
        middle = (low + high) // 2
        more = slots(plans_for_budget(needs, middle, "it")) != slots(plans)
        low, high = (low, middle) if more else (middle, high)
    assert nbytes(needs, plans_for_budget(needs, high, "it")) == high


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_what_the_error_advises_works(needs: Needs) -> None:
    least = smallest(needs)
    plans_for_budget(needs, least, "it")
    with pytest.raises(
        ConfigError, match=r"cache = '1B' gives .* too little to hold the experts of one token"
    ) as caught:
        plans_for_budget(needs, least - 1, "'1B'")
    advised = re.search(r"is '(\d+[KM]iB)' \(([\d.]+)%\)", str(caught.value))
    assert advised is not None
    size = CacheBudget.parse(advised[1]).size
    assert size is not None
    plans_for_budget(needs, size, "as advised")
    plans_for_budget(needs, math.ceil(bytes_of_everything(needs) * float(advised[2]) / 100), "as advised")


def test_equal_layers_get_equal_windows_and_weights_move_slots_between_them() -> None:
    record = 3 << 20
    needs = {"it": WindowNeeds((record,), (32,) * 4, (4,) * 4, (1.0,) * 4)}
    assert plans_for_budget(needs, record * 33, "it")["it"].slots == (9, 8, 8, 8)
    needs = {"it": WindowNeeds((record,), (32,) * 4, (4,) * 4, (1.0, 1.0, 2.0, 4.0))}
    assert plans_for_budget(needs, record * 33, "it")["it"].slots == (4, 4, 8, 17)
