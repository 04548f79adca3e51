"""What the page says of what is going on, and what it advises."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.report.reports import a_report
from vllm_moe_offload.page.model import Model, Sample, models_of_reports
from vllm_moe_offload.page.summary import State, Summary, Window, percent, summarize
from vllm_moe_offload.report import Prediction, Role, WorkerReport
from vllm_moe_offload.stats import STATISTICS, Stats

NAMES = tuple(each.name for each in STATISTICS)
QUIET = Stats(experts=64, slots=16, expert_bytes=64 << 20, slot_bytes=16 << 20)


def a_worker(time: float, changed: dict[str, Any] | None = None, **counted: float) -> WorkerReport:
    """With nothing on its conscience but what is named."""
    values = {name: getattr(QUIET, name) for name in a_report().stats} | counted
    return a_report(time=time, started=0.0, stats=values, **(changed or {}))


def said(*reports: WorkerReport, now: float | None = None) -> Summary:
    """Of a model whose one worker has reported these one after another."""
    samples: list[Sample] = []
    for report in reports:
        (model,) = models_of_reports([report])
        samples.append(model.sample(samples[-1] if samples else None))
    summary = summarize(model, samples, reports[-1].time if now is None else now)
    sentence, *advice = (text.replace("\N{NO-BREAK SPACE}", " ") for text in (summary.sentence, *summary.advice))
    return Summary(summary.state, sentence, advice)


def test_a_good_minute() -> None:
    summary = said(a_worker(0), a_worker(10, tokens=100, hits=980, misses=20, stall_seconds=0.3))
    assert summary.state == State.GOOD
    assert summary.sentence == "98 % of experts were found in memory; tokens waited 3 % of the time."
    assert not summary.advice


def test_only_the_last_minute_counts_and_only_the_time_that_tokens_took() -> None:
    start = a_worker(0)
    bad = a_worker(100, tokens=10, hits=0, misses=1000, stall_seconds=90)
    before = a_worker(150, tokens=10, hits=0, misses=1000, stall_seconds=90)
    busy = a_worker(160, tokens=20, hits=990, misses=1010, stall_seconds=95)
    assert (
        said(start, bad, before, busy).sentence
        == "99 % of experts were found in memory; tokens waited 50 % of the time."
    )


def test_waiting_is_answered_with_a_larger_cache_and_what_it_would_hold() -> None:
    uses = np.zeros((2, 3), np.float32)
    uses[0] = [50, 30, 20]
    experts = a_report().experts
    experts.uses = uses.tobytes()
    counted = {"experts": 6, "slots": 1, "expert_bytes": 6 << 30}
    summary = said(
        a_worker(0, {"experts": experts}, **counted),
        a_worker(10, {"experts": experts}, **counted, tokens=10, hits=50, misses=50, stall_seconds=4),
    )
    assert summary.state == State.WAITING
    assert summary.advice == [
        "A larger cache would help: --moe-offload-cache 33% (2.0 GiB per worker) has room for the experts that took "
        "80 % of recent uses; as many as fit now took 50 % at most."
    ]


def test_nothing_else_would_help_where_everything_fits() -> None:
    summary = said(a_worker(0, slots=64), a_worker(10, slots=64, tokens=10, hits=100, stall_seconds=9))
    assert (summary.state, summary.sentence) == (State.GOOD, "All 64 experts are in memory: tokens do not wait.")
    assert not summary.advice


def test_nobody_has_asked_yet() -> None:
    assert said(a_worker(0), a_worker(1)).state == State.STARTING


def test_nobody_asks_now() -> None:
    served = {"tokens": 100, "hits": 90, "misses": 10}
    summary = said(a_worker(0), a_worker(10, **served), a_worker(100, **served), a_worker(101, **served))
    assert summary.state == State.IDLE
    assert summary.sentence == "Idle: 90 % of experts were found in memory since the start."


def test_a_model_that_nobody_uses() -> None:
    summary = summarize(Model("a-model", 0.0, 5.0, dict.fromkeys(NAMES, 0), 0, ()), [], now=5.0)
    assert summary.sentence == "No engine uses this model at present."


@pytest.mark.parametrize(
    ("counted", "sentence", "advice"),
    [
        ({"failed_loads": 2}, "2 experts could not be read, and requests that needed them failed.", "store verify"),
        ({"failed_threads": 1}, "1 of the threads have ended by an error.", "Restart the engine"),
    ],
)
def test_problems_come_first(counted: dict[str, float], sentence: str, advice: str) -> None:
    summary = said(a_worker(0), a_worker(1, tokens=1, hits=1, **counted))
    assert (summary.state, summary.sentence) == (State.PROBLEM, sentence)
    assert advice in summary.advice[0]


def test_workers_that_are_silent() -> None:
    summary = said(a_worker(0), a_worker(1, tokens=1, hits=1), now=31.0)
    assert (summary.state, summary.sentence) == (State.PROBLEM, "The workers have not reported for 30 s.")


def test_prefetching_in_vain_and_a_predictor_that_is_paused() -> None:
    paused = {"prediction": Prediction.PAUSED, "prediction_reason": "it has not paid lately"}
    served = {"tokens": 1, "hits": 1, "prefetches": 200, "prefetch_wasted": 150}
    wasted, prediction = said(a_worker(0), a_worker(1, paused, **served)).advice
    assert wasted.startswith("75 % of what was prefetched was not used.")
    assert prediction == "Prediction is paused: it has not paid lately."


@given(st.floats(0, 1))
def test_only_all_is_said_to_be_all_and_only_none_none(share: float) -> None:
    text = percent(share).removesuffix("\N{NO-BREAK SPACE}%")
    assert (float(text) == 100) == (share == 1)
    assert (float(text) == 0) == (share == 0)
    assert float(text) == pytest.approx(100 * share, abs=0.5)


counts = st.integers(0, 10**6)
steps = st.lists(st.tuples(st.floats(0.5, 90), counts, counts, counts, st.floats(0, 100)), min_size=2, max_size=20)


@settings(max_examples=50)
@given(steps)
def test_shares_are_shares_whatever_is_counted(steps: list[tuple[float, int, int, int, float]]) -> None:
    times, tokens, hits, misses, stalls = (list(itertools.accumulate(column)) for column in zip(*steps, strict=True))
    reports = [
        a_worker(time, tokens=tokens[n], hits=hits[n], misses=misses[n], stall_seconds=stalls[n])
        for n, time in enumerate(times)
    ]
    samples: list[Sample] = []
    for report in reports:
        samples.append(models_of_reports([report])[0].sample(samples[-1] if samples else None))
    window = Window.of(samples)
    assert window is not None
    assert 0 <= window.waiting <= 1
    assert 0 <= window.busy_seconds <= window.time + 1e-9
    assert window.hit_rate is None or 0 <= window.hit_rate <= 1
    assert summarize(models_of_reports(reports[-1:])[0], samples, times[-1]).sentence.endswith(".")


def test_ranks_of_a_replica_wait_together_and_replicas_add_up() -> None:
    def of(replica: int, rank: int, **counted: float) -> WorkerReport:
        return a_worker(1, {"replica": replica, "rank": rank, "engine": f"e_dp{replica}"}, **counted)

    (model,) = models_of_reports(
        [
            of(0, 0, tokens=10, hits=5, stall_seconds=2.0),
            of(0, 1, tokens=10, hits=6, stall_seconds=1.0),
            of(1, 0, tokens=7, hits=1, stall_seconds=4.0),
        ]
    )
    totals = model.totals
    assert (totals["tokens"], totals["hits"], totals["stall_seconds"]) == (17, 12, 6.0)
    assert (totals["slots"], totals["experts"]) == (16, 64)


def test_a_drafter_is_a_model_of_its_own_after_the_one_it_drafts_for() -> None:
    drafter = a_report(role=Role.DRAFTER, model="draft")
    assert [model.name for model in models_of_reports([drafter, a_report()])] == [
        "tiny-moe",
        "draft (drafts for tiny-moe)",
    ]
