"""Whether a user learns that chunked prefill is cut too small to be worth its reads, and learns it once."""

import time

import pytest

from vllm_moe_offload.integration import report
from vllm_moe_offload.integration.report import ChunkReport
from vllm_moe_offload.stats import Stats

MOST = 512


class Steps:
    """Steps on a clock of the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.stats = Stats()
        self.lines: list[str] = []
        self.report = ChunkReport(self.stats, MOST)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(report.logger, "info", lambda text, *values: self.lines.append(text % values))

    def step(self, tokens: int, computing: float, stalled: float) -> None:
        self.report.begin_step(tokens)
        self.now += computing + stalled
        self.stats.stall_seconds += stalled
        self.report.end_step()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def test_a_full_step_that_mostly_waits_is_reported_once_with_the_setting(steps: Steps) -> None:
    steps.step(MOST, computing=1, stalled=3)
    steps.step(MOST, computing=1, stalled=3)
    assert steps.lines == [
        "a prefill step of 512 tokens waited for experts for 3.00 of 4.00 s; steps of more tokens read "
        "experts less often: raise --max-num-batched-tokens (now 512)"
    ]


def test_nothing_is_said_of_steps_that_compute_longer_or_were_not_cut(steps: Steps) -> None:
    steps.step(MOST, computing=3, stalled=1)
    steps.step(MOST - 1, computing=1, stalled=3)
    steps.step(8, computing=1, stalled=30)
    assert steps.lines == []
