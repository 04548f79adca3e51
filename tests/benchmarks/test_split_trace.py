"""What is replayed and what is remembered have no kind of request in common."""

from dataclasses import replace

import numpy as np
import pytest
from split_trace import split

from tests.replay.replay_traces import random_trace


def test_kinds_stay_together_and_nothing_is_lost():
    kinds = np.array(["law", "law", "code", "poems", "code", "maths", "maths", "maths"])
    trace = replace(random_trace(3, 8, 2, (3, 2, 5, 1, 2, 4, 1, 3)), group=kinds)
    for seed in range(10):
        held_out, others = split(trace, 0.25, seed)
        assert sorted([*held_out, *others]) == list(range(8))
        assert len(held_out) >= 2 and len(others) > 0
        assert not set(kinds[held_out]) & set(kinds[others])
    assert len({tuple(split(trace, 0.25, seed)[0]) for seed in range(10)}) > 1


def test_traces_without_kinds_cannot_be_split():
    trace = random_trace(3, 8, 2, (3, 2))
    with pytest.raises(ValueError, match="no `group`"):
        split(trace, 0.25, 0)
    with pytest.raises(ValueError, match="of the kind 'law'"):
        split(replace(trace, group=np.array(["law", "law"])), 0.25, 0)
