"""Reports of workers, put together by the model they are of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import msgspec

from ..report import Role, WorkerReport
from ..stats import STATISTICS, Number

_COUNTERS = tuple(each.name for each in STATISTICS if each.kind == "counter")
_GAUGES = tuple(each.name for each in STATISTICS if each.kind == "gauge")
_ONCE_PER_REPLICA = frozenset({"tokens", "steps", "stall_seconds"})
"""Counters of which the ranks of a replica count the same thing; the rank that counted most stands for them."""


class Sample(msgspec.Struct):
    """Counters of one model at one time, since its engine started."""

    time: float
    """Seconds since 1970."""
    busy_seconds: float
    """Of that time, in which tokens were computed."""
    tokens: int
    hits: int
    misses: int
    stall_seconds: float
    """Per replica."""
    loaded_bytes: int
    """From disk."""
    copied_bytes: int
    """From host memory to a device."""
    prefetches: int
    prefetch_useful: int
    prefetch_late: int
    prefetch_wasted: int


@dataclass
class Model:
    """One model, whoever computes with it.

    Args:
        key: no other model's of the same source.
        reports: of its workers; none if nobody uses it.
        stats: what is known of it without them.
    """

    key: str
    name: str
    reports: Sequence[WorkerReport] = ()
    stats: dict[str, Number] = field(default_factory=dict)

    @property
    def time(self) -> float:
        """Of the latest report, 0 without any."""
        return max((report.time for report in self.reports), default=0.0)

    @property
    def started(self) -> float:
        return min((report.started for report in self.reports), default=0.0)

    @property
    def replicas(self) -> int:
        """Data-parallel ones, of all engines."""
        return len({(report.engine, report.replica) for report in self.reports})

    def totals(self) -> dict[str, Number]:
        """Of all workers, by the names in ``stats.Stats``; time waited is the mean over replicas."""
        totals = dict.fromkeys((*_COUNTERS, *_GAUGES), 0) | self.stats
        if not self.reports:
            return totals
        for name in _COUNTERS:
            totals[name] = sum(self._of_replicas(name))
        totals["stall_seconds"] /= self.replicas
        for name in _GAUGES:
            totals[name] = self.stats.get(name) or max(report.stats.get(name, 0) for report in self.reports)
        return totals

    def sample(self, before: Sample | None) -> Sample:
        """What is counted now.

        Args:
            before: the last one; tokens that came since say that the time between was busy.
        """
        totals = self.totals()
        names = [name for name in Sample.__struct_fields__ if name not in ("time", "busy_seconds")]
        busy = before.busy_seconds if before else 0.0
        if before and totals["tokens"] > before.tokens:
            busy += self.time - before.time
        return Sample(time=self.time, busy_seconds=busy, **{name: totals[name] for name in names})  # type: ignore[arg-type]

    def _of_replicas(self, name: str) -> list[Number]:
        together = max if name in _ONCE_PER_REPLICA else sum
        return [
            together(report.stats.get(name, 0) for report in reports)
            for _, reports in groupby(self.reports, key=lambda report: (report.engine, report.replica))
        ]


def models_of_reports(reports: Iterable[WorkerReport]) -> list[Model]:
    """Those that are served, then those that draft for them; engines of the same model together.

    Args:
        reports: as ``read_reports`` sorts them.
    """
    groups: dict[tuple[bool, str], list[WorkerReport]] = {}
    for report in reports:
        groups.setdefault((report.role == Role.DRAFTER, _name(report)), []).append(report)
    return [Model(name, name, members) for (_, name), members in sorted(groups.items(), key=lambda item: item[0])]


def _name(report: WorkerReport) -> str:
    if report.role == Role.DRAFTER:
        return f"{report.model} (drafts for {report.served_model})"
    return report.served_model or report.model
