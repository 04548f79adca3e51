"""Every statistic that a worker counts is in the RPC; every one with a phrase is in the line of vLLM's log."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.log_lines import log_lines
from vllm_moe_offload.integration import report
from vllm_moe_offload.integration.report import StatsReport
from vllm_moe_offload.integration.serving import ServedModel
from vllm_moe_offload.stats import STATISTICS, WORKER_STATISTICS, Stats
from vllm_moe_offload.threads import failed_threads


def test_what_the_runtime_counts_and_what_is_measured_is_in_the_rpc() -> None:
    counted = Stats(**{each.name: 100 + number for number, each in enumerate(STATISTICS)})
    residency = np.array([0, 1, 2, 1, 0, 0, 0, 0], np.uint8)
    layer = SimpleNamespace(experts=8, span=range(8), pool=SimpleNamespace(residency=lambda span: residency))

    def measure(stats: Stats) -> None:
        stats.history_tokens = 7

    served: Any = ServedModel.__new__(ServedModel)
    served.runtime = SimpleNamespace(stats=counted, layers={"one": layer, "two": layer}, slots=5, slot_bytes=500)
    served._expert_bytes, served._managed = 1600, None
    served._daemon = SimpleNamespace(daemon_pid=4711)
    served._history = SimpleNamespace(measure=measure)
    stats = served.stats()
    assert set(stats) == {each.name for each in WORKER_STATISTICS} | {"daemon_pid"}
    assert (stats["hits"], stats["daemon_pid"], stats["history_tokens"]) == (counted.hits, 4711, 7)
    assert (stats["layers"], stats["experts"], stats["expert_bytes"]) == (2, 16, 1600)
    assert (stats["resident_experts"], stats["pinned_slots"]) == (6, 2)
    assert (stats["slots"], stats["slot_bytes"], stats["failed_threads"]) == (5, 500, len(failed_threads()))


def test_a_line_says_what_a_period_did_to_every_statistic_with_a_phrase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stats = Stats(**{each.name: 1000 for each in STATISTICS})
    log = StatsReport(stats, "the drafter's ")
    shown = [each for each in STATISTICS if each.phrase]
    for number, each in enumerate(shown):
        setattr(stats, each.name, 1000 + 60 * (number + 1) * (2**20 if each.unit == "bytes" else 1))
    stats.hits, stats.misses, stats.stall_seconds = 1003, 1001, 1024.0
    with log_lines() as lines:
        now[0] += 59
        log.maybe_log("on")
        assert not lines, "the period is not over"
        now[0] += 1
        log.maybe_log("paused")
    (line,) = lines
    assert line.startswith("75.0% of 4 the drafter's experts were in fast memory; ")
    assert line.endswith("; prediction is paused")
    assert "1.0 MiB/s loaded" in line and "40% of the time stalled" in line
    for number, each in enumerate(shown):
        if each.unit not in ("bytes", "seconds"):
            assert f"{60 * (number + 1)} {each.phrase}" in line


def test_a_period_without_experts_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SECONDS_BETWEEN_LINES", 0.0)
    with log_lines() as lines:
        StatsReport(Stats()).maybe_log("on")
    assert not lines
