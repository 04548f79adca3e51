"""shift.py: who is asked what and when, and what is compared with what."""

from typing import Any

import pytest
from prompts import Prompt
from shift import FORGETFUL, OFF, REMEMBERING, SHIFT, START, Visit, itinerary, summarize_moment

from vllm_moe_offload.bench.summary import Spread

PROMPTS = [Prompt(f"{domain}{number}", domain) for domain in "abc" for number in range(2)] + [Prompt("d0", "d")]


def test_the_first_request_of_every_topic_is_measured() -> None:
    assert list(itinerary(PROMPTS, topics=2, stay=2, number=0)) == [
        Visit("a0", START),
        Visit("a1", None),
        Visit("b0", SHIFT),
        Visit("b1", None),
    ]
    assert [visit.text for visit in itinerary(PROMPTS, 4, 1, 1)] == ["b1", "c1", "d0", "a1"]


def test_one_topic_is_not_enough() -> None:
    with pytest.raises(ValueError, match="only a has 2 prompts"):
        list(itinerary([Prompt("a0", "a"), Prompt("a1", "a"), Prompt("b0", "b")], 2, 2, 0))


def _run(tpot: float, stalled: float) -> dict[str, Any]:
    counters = {"hits": 3, "misses": 1, "steps": 10, "stall_seconds": 10 * stalled}
    return {"tpot": [tpot], "tokens": [[1]], "decode_counters": counters}


def test_requests_are_compared_with_the_same_without_prediction() -> None:
    runs = {OFF: [_run(2, 1), _run(4, 2)], REMEMBERING: [_run(1, 0.5), _run(1, 0.5)], FORGETFUL: [_run(2, 1)] * 2}
    summary = summarize_moment(runs)
    assert summary[REMEMBERING]["tpot_ratio"] == Spread(0.375, 0.25, 0.5)
    assert summary[REMEMBERING]["stall_ratio"] == Spread(0.375, 0.25, 0.5)
    assert summary[OFF]["tpot_ratio"] == Spread(1, 1, 1)
    assert summary[FORGETFUL]["hit_rate"] == 0.75 and summary[FORGETFUL]["same_tokens"] is True
