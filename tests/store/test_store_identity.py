"""One changed fact, another fingerprint; and which of two stores takes the place of the other."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.store import StoreIdentity

scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.text('ab"\\é', max_size=5))
fact_names = st.sampled_from(["vllm", "dtype", "isa", "rank"])
facts = st.dictionaries(fact_names, st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=5)


@settings(deadline=None)
@given(facts, facts)
def test_fingerprints_agree_exactly_when_no_fact_differs(ours: dict, theirs: dict) -> None:
    left, right = StoreIdentity(ours), StoreIdentity(theirs)
    assert (left.fingerprint == right.fingerprint) == (left.differences(right) == [])
    assert left.differences(right) == right.differences(left)
    assert StoreIdentity(json.loads(json.dumps(ours))).fingerprint == left.fingerprint
    assert StoreIdentity(dict(reversed(ours.items()))).fingerprint == left.fingerprint


def test_differences_are_named_also_inside() -> None:
    ours = StoreIdentity({"vllm": "0.32.0", "parallel": {"tp_rank": 0, "tp_size": 2}, "dtype": "bfloat16"})
    theirs = StoreIdentity({"vllm": "0.31.0", "parallel": {"tp_rank": 1, "tp_size": 2}, "isa": "amx"})
    assert ours.differences(theirs) == ["dtype", "isa", "parallel.tp_rank", "vllm"]


def test_the_folder_is_no_part_of_the_fingerprint() -> None:
    assert StoreIdentity({"a": 1}, "/one").fingerprint == StoreIdentity({"a": 1}, "/two").fingerprint


@pytest.mark.parametrize("fact", ["vllm", "torch", "checkpoint", "model", "format"])
def test_a_store_is_replaced_by_one_of_other_software_or_content(fact: str) -> None:
    old = StoreIdentity({"dtype": "bfloat16", fact: "old"}, "/models/mixtral")
    assert StoreIdentity({"dtype": "bfloat16", fact: "new"}, "/models/mixtral").could_replace(old)
    assert not StoreIdentity({"dtype": "bfloat16", fact: "new"}, "/models/other").could_replace(old)
    assert not StoreIdentity({"dtype": "float32", fact: "new"}, "/models/mixtral").could_replace(old)
