"""What steps leave comes to the same as counting it at once, whenever it is taken."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.load_report import LoadReport
from vllm_moe_offload.report.activity import Activity, LayerIds
from vllm_moe_offload.report.summary import MOST_ENDED, Summary
from vllm_moe_offload.stats import Stats

LAYERS = [LayerIds("one", 0, 4), LayerIds("two", 0, 6), LayerIds("three", 4, 4)]
"""Of two record layouts; the first and the last have one."""

Needs = list[set[int]]
steps = st.fixed_dictionaries(
    {
        "scheduled": st.dictionaries(st.sampled_from("abcd"), st.integers(1, 3), min_size=1),
        "needs": st.tuples(*(st.sets(st.integers(0, layer.experts - 1)) for layer in LAYERS)),
        "misses": st.integers(0, 2),
        "stalled": st.sampled_from([0.0, 0.004, 0.5]),
        "ended": st.sets(st.sampled_from("abcd")),
        "look": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, max_size=12))
def test_a_report_adds_up_what_every_step_did(script: list[dict]) -> None:
    stats = Stats()
    activity = Activity(stats, LAYERS)
    summary = Summary(activity)
    uses = np.zeros((3, 6))
    of_requests: dict[str, Counter] = {}
    ended: list[tuple[str, Counter]] = []
    for step in script:
        activity.begin_step(step["scheduled"])
        for number, (layer, needed) in enumerate(zip(LAYERS, step["needs"], strict=True)):
            activity.use(number, np.array(sorted(needed), np.int64) + layer.first)
            uses[number, sorted(needed)] += 1
            report = LoadReport(hits=len(needed), misses=step["misses"], waited=step["stalled"])
            stats.add(report)
            activity.note(number, report)
        activity.end_step()
        activity.end_step()
        for request, tokens in step["scheduled"].items():
            experts = sum(map(len, step["needs"])) + 3 * step["misses"]
            counted = Counter(steps=1, tokens=tokens, experts=experts, misses=3 * step["misses"])
            of_requests.setdefault(request, Counter()).update(counted | Counter(stalled=3 * step["stalled"]))
        activity.end_requests(step["ended"])
        ended += [(request, of_requests.pop(request)) for request in step["ended"] if request in of_requests]
        if step["look"]:
            summary.update(0.0)
    summary.update(0.0)

    found = summary.expert_map(None)
    assert np.array_equal(np.frombuffer(found.uses, np.float32).reshape(3, 6), uses)
    assert found.hits == [sum(len(step["needs"][number]) for step in script) for number in range(3)]
    assert found.misses == [sum(step["misses"] for step in script)] * 3
    assert np.allclose(found.stall_seconds, sum(step["stalled"] for step in script))
    assert sum(summary.step_stalls.counts) == len(script)
    assert np.isclose(summary.step_stalls.sum, stats.stall_seconds)
    assert sum(summary.request_stalls.counts) == len(ended)
    running = {report.id: report for report in summary.requests if report.running}
    assert running.keys() == of_requests.keys()
    for request, counted in of_requests.items():
        report = running[request]
        assert (report.steps, report.tokens, report.experts) == (
            counted["steps"],
            counted["tokens"],
            counted["experts"],
        )
        assert report.misses == counted["misses"] and np.isclose(report.stall_seconds, counted["stalled"])
    last = [report for report in summary.requests if not report.running]
    assert len(last) == min(MOST_ENDED, len(ended))
    assert Counter(r.steps for r in last) == Counter(c["steps"] for _, c in ended[-MOST_ENDED:])


def test_uses_count_half_after_a_minute_and_those_of_a_device_count_once_a_step() -> None:
    summary = Summary(activity := Activity(Stats(), LAYERS))
    ids = np.array([[[0, 1], [1, -1]], [[5, 2], [2, 5]], [[3, 0], [-1, -1]]])
    activity.note_routed({"a": 1, "b": 1}, ids, np.array([2, 2, 2]), np.array([1, 0, 2]))
    summary.update(1.0)
    uses = np.zeros((3, 6), np.float32)
    uses[[0, 0, 1, 1, 2, 2], [0, 1, 2, 5, 0, 3]] = 1
    assert [(r.id, r.steps, r.tokens, r.experts, r.misses) for r in summary.requests] == [
        ("a", 1, 1, 6, 3),
        ("b", 1, 1, 6, 3),
    ]
    found = summary.expert_map(np.zeros((3, 6), np.uint8))
    assert np.array_equal(np.frombuffer(found.uses, np.float32).reshape(3, 6), uses)
    assert (found.hits, found.misses, len(found.resident)) == ([1, 2, 0], [1, 0, 2], 18)
    summary.update(60.0)
    found = summary.expert_map(None)
    assert np.array_equal(np.frombuffer(found.uses, np.float32).reshape(3, 6), uses / 2)
    assert found.resident == b""


def test_a_stall_is_counted_below_the_bound_that_it_reaches() -> None:
    stats = Stats()
    summary = Summary(activity := Activity(stats, LAYERS))
    for stalled in (0.0, 0.001, 0.0011, 99.0):
        activity.begin_step({"a": 1})
        stats.stall_seconds += stalled
        activity.end_step()
    summary.update(0.0)
    bounds, counts = summary.step_stalls.bounds, summary.step_stalls.counts
    assert bounds[:2] == [0.001, 0.0025] and counts[:2] == [2, 1] and counts[-1] == 1 and len(counts) == len(bounds) + 1
