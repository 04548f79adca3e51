"""footprint.py: what a memory limit leaves for experts, and which limit leaves a share of them."""

import pytest
from footprint import GIB, MARGIN, MIB, Allowance, Footprint

FOOTPRINT = Footprint.of(peak=3 * GIB, mapped=200 * MIB, experts_held=2 * GIB, mapped_weights=50 * MIB)


def test_besides_experts_is_all_that_is_none() -> None:
    assert FOOTPRINT.besides_experts == 1 * GIB + 250 * MIB


def test_equal_memory_leaves_a_peer_what_it_does_not_need_itself() -> None:
    allowance = Allowance.of(FOOTPRINT, 8 * GIB, memory_limit=4 * GIB, share=None)
    assert allowance == (4 * GIB, 3 * GIB - 250 * MIB - MARGIN)
    assert Allowance.of(FOOTPRINT, 1 * GIB, memory_limit=4 * GIB, share=None).experts == 1 * GIB


def test_an_equal_share_costs_what_the_peer_needs_itself_and_the_share() -> None:
    allowance = Allowance.of(FOOTPRINT, 8 * GIB, memory_limit=None, share=0.25)
    assert allowance == (3 * GIB + 250 * MIB + MARGIN, 2 * GIB)
    assert Allowance.of(FOOTPRINT, 8 * GIB, memory_limit=allowance.limit, share=None) == allowance


def test_a_limit_that_leaves_nothing_is_refused_with_the_need() -> None:
    with pytest.raises(ValueError, match=r"needs 1\.37 GiB besides experts, the limit is 1\.00 GiB"):
        Allowance.of(FOOTPRINT, 8 * GIB, memory_limit=1 * GIB, share=None)
