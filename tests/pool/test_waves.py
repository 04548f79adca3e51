"""Groups of rows: every row once, never more experts than fit, and quickly."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vllm_moe_offload.pool.waves import group_rows, order_arrivals, streams


@st.composite
def routed_batches(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """(chosen, experts, capacity): ids from -1, capacities from the largest need of a row to more than there are."""
    experts = draw(st.integers(1, 24))
    shape = draw(st.integers(0, 40)), draw(st.integers(1, 8))
    dtype = draw(st.sampled_from([np.int32, np.int64]))
    chosen = draw(arrays(dtype, shape, elements=st.integers(-1, experts - 1)))
    largest = max((distinct(row) for row in chosen), default=0)
    return chosen, experts, max(1, largest) + draw(st.sampled_from([0, 0, 1, 2, 7, experts, 100_000]))


def distinct(chosen: np.ndarray) -> int:
    return len(np.unique(chosen[chosen >= 0]))


@given(routed_batches())
def test_groups_partition_the_rows_and_fit(batch: tuple[np.ndarray, int, int]) -> None:
    chosen, experts, capacity = batch
    groups = group_rows(chosen, experts, capacity)
    assert sorted(np.concatenate([*groups, []]).tolist()) == list(range(len(chosen)))
    assert all(len(group) and (np.diff(group) > 0).all() for group in groups)
    assert all(distinct(chosen[group]) <= capacity for group in groups)
    if distinct(chosen) <= capacity:
        assert len(groups) <= 1


@given(routed_batches())
def test_no_row_of_a_later_group_would_have_fitted_into_an_earlier_one(batch: tuple[np.ndarray, int, int]) -> None:
    chosen, experts, capacity = batch
    groups = group_rows(chosen, experts, capacity)
    for number, group in enumerate(groups):
        for row in np.concatenate([*groups[number + 1 :], []]).astype(int):
            assert distinct(chosen[[*group, row]]) > capacity


def test_rows_that_choose_alike_are_computed_together() -> None:
    chosen = np.array([[0, 1], [2, 3], [1, 0], [3, 2], [0, 0], [-1, -1]])
    assert [group.tolist() for group in group_rows(chosen, 4, 2)] == [[0, 2, 4, 5], [1, 3]]


def test_a_row_that_cannot_fit_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="a single row needs more experts"):
        group_rows(np.array([[0, 1, 2]]), 4, 2)


@pytest.mark.parametrize("experts", [64, 128, 256])
@pytest.mark.parametrize("capacity", [8, 16, 32])
def test_a_large_batch_is_cut_up_in_a_fraction_of_a_second(experts: int, capacity: int) -> None:
    """2048 rows of top-8 take 30-110 ms on one core; the bound leaves room for a busy machine."""
    chosen = np.argsort(np.random.default_rng(0).random((2048, experts)), axis=1)[:, :8].astype(np.int32)
    started = time.process_time()
    groups = group_rows(chosen, experts, capacity)
    assert time.process_time() - started < 0.5
    assert sum(map(len, groups)) == 2048


def test_a_long_prefill_streams_and_decoding_does_not() -> None:
    assert streams(choices=2048 * 8, experts=64, slots=64)
    assert not streams(choices=16 * 8, experts=64, slots=1024)
    assert not streams(choices=2048 * 8, experts=64, slots=63)


@given(routed_batches(), st.integers(0, 2**32))
def test_rows_are_computed_when_their_experts_are_there(batch: tuple[np.ndarray, int, int], seed: int) -> None:
    chosen, experts, _ = batch
    absent = np.random.default_rng(seed).random(experts) < 0.5
    order, groups = order_arrivals(chosen, absent)
    assert sorted(order.tolist()) == sorted(set(chosen[chosen >= 0].tolist())), "each needed expert once"
    assert (np.diff(absent[order].astype(int)) >= 0).all(), "resident ones first"
    assert sorted(row for rows, _ in groups for row in rows.tolist()) == list(range(len(chosen)))
    for rows, count in groups:
        assert set(chosen[rows][chosen[rows] >= 0].tolist()) <= set(order[:count].tolist())
    counts = [count for _, count in groups]
    assert counts == sorted(counts) and counts[-1:] == [len(order)][: len(counts)]


def test_rows_without_absent_experts_go_first_and_half_of_the_loads_lets_others_go() -> None:
    chosen = np.array([[4, 5], [0, 1], [2, 3], [6, 7]])
    absent = np.array([False, False, False, True, True, True, True, True])
    order, groups = order_arrivals(chosen, absent)
    assert order.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [(rows.tolist(), count) for rows, count in groups] == [([1], 3), ([0, 2], 6), ([3], 8)]
