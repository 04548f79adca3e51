"""What steps come to over time: how often each expert is used lately, how long steps and requests have waited."""

import time
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from .activity import Activity, EndedStep
from .report import REQUEST_SECONDS, STEP_SECONDS, ExpertMap, Histogram, RequestReport

MOST_ENDED = 32
"""Requests that are remembered after they have ended."""
HALF_LIFE_SECONDS = 60.0


class Summary:
    """Of one model's ``activity``, kept up to date by one thread."""

    def __init__(self, activity: Activity):
        self._activity = activity
        self.experts = max((layer.experts for layer in activity.layers), default=0)
        """The most of any layer."""
        self.step_stalls = Histogram.empty(STEP_SECONDS)
        self.request_stalls = Histogram.empty(REQUEST_SECONDS)
        self._uses = np.zeros((len(activity.layers), self.experts), dtype=np.float32)
        self._running: dict[str, RequestReport] = {}
        self._ended: list[RequestReport] = []

    def update(self, seconds: float) -> None:
        """Take in what has happened in so many ``seconds`` since the last call."""
        self._uses *= 0.5 ** (seconds / HALF_LIFE_SECONDS)
        self._uses += self._activity.take_uses(self.experts)
        alike: list[EndedStep] = []
        """Steps over the same requests, one after another: mostly all of them."""
        for entry in self._activity.take_steps():
            if isinstance(entry, EndedStep):
                self.step_stalls.add(entry.stall_seconds)
                if alike and alike[-1].scheduled != entry.scheduled:
                    self._share_out(alike)
                    alike = []
                alike.append(entry)
            else:
                self._share_out(alike)
                alike = []
                self._end(entry)
        self._share_out(alike)

    @property
    def requests(self) -> list[RequestReport]:
        """Running ones, then those that ended last, the latest first."""
        return [*self._running.values(), *reversed(self._ended)]

    def expert_map(self, resident: NDArray[np.uint8] | None) -> ExpertMap:
        """Of now. ``resident``: ``[layers, experts]``; None where that is not known."""
        activity = self._activity
        assert resident is None or resident.shape == self._uses.shape
        return ExpertMap(
            layers=[layer.name for layer in activity.layers],
            experts=self.experts,
            resident=b"" if resident is None else resident.tobytes(),
            uses=self._uses.tobytes(),
            hits=list(activity.hits),
            misses=list(activity.misses),
            stall_seconds=list(activity.stall_seconds),
        )

    def _share_out(self, steps: list[EndedStep]) -> None:
        """Every request of ``steps``, which all have the same, has been through all of them."""
        if not steps:
            return
        experts, misses = sum(step.experts for step in steps), sum(step.misses for step in steps)
        stalled = sum(step.stall_seconds for step in steps)
        for request, tokens in steps[0].scheduled.items():
            report = self._running.get(request)
            if report is None:
                report = self._running[request] = RequestReport(request, running=True)
            report.steps += len(steps)
            report.tokens += len(steps) * tokens
            report.experts += experts
            report.misses += misses
            report.stall_seconds += stalled
        time.sleep(0)  # the thread of the steps may be waiting for the interpreter

    def _end(self, requests: Collection[str]) -> None:
        for request in requests:
            report = self._running.pop(request, None)
            if report is not None:
                report.running = False
                self.request_stalls.add(report.stall_seconds)
                self._ended.append(report)
        del self._ended[:-MOST_ENDED]
