"""Reports of workers, put together by the model they are of."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec

from ..report import Role, WorkerReport
from ..stats import STATISTICS, Number

_COUNTERS = tuple(each.name for each in STATISTICS if each.kind == "counter")
_GAUGES = tuple(each.name for each in STATISTICS if each.kind == "gauge")
_ONCE_PER_REPLICA = frozenset({"tokens", "steps", "stall_seconds"})
"""Counters of which the ranks of a replica count the same thing; the rank that counted most stands for them."""


class Sample(msgspec.Struct):
    """Counters of one model at one time."""

    time: float
    """Seconds since 1970."""
    busy_seconds: float
    """In which tokens were computed, since the first sample."""
    stall_seconds: float
    """In which a forward pass waited, since the first sample: the mean of those that run side by side."""
    stalled: float
    """The same of all of them together, since the start."""
    tokens: int
    hits: int
    misses: int
    loaded_bytes: int
    """From disk."""
    copied_bytes: int
    """From host memory to a device."""
    prefetches: int
    prefetch_useful: int
    prefetch_late: int
    prefetch_wasted: int


_SAMPLED = tuple(name for name in Sample.__struct_fields__ if name in _COUNTERS and name != "stall_seconds")


@dataclass(frozen=True)
class Model:
    """One model, in whichever engines."""

    name: str
    """No other model's of the same source."""
    started: float
    """Seconds since 1970 at which counting began."""
    time: float
    """Of what is known of it, likewise."""
    totals: Mapping[str, Number]
    """Of all workers, by the names in ``stats.Stats``."""
    parallel: int
    """How many forward passes run side by side, whose waiting ``totals`` adds up; 0 while no engine uses the model."""
    reports: Sequence[WorkerReport]
    """Of its workers, as far as they can be read."""

    @classmethod
    def of(cls, name: str, reports: Sequence[WorkerReport]) -> "Model":
        """What its workers report, at least one."""
        totals = {name: sum(_of_replicas(reports, name)) for name in _COUNTERS}
        totals |= {name: max(report.stats.get(name, 0) for report in reports) for name in _GAUGES}
        return cls(
            name=name,
            started=min(report.started for report in reports),
            time=max(report.time for report in reports),
            totals=totals,
            parallel=len(list(_replicas(reports))),
            reports=reports,
        )

    def sample(self, before: Sample | None) -> Sample:
        """What is counted now.

        Args:
            before: the last one; tokens that came since say that the time between was busy.
        """
        counted: dict[str, Any] = {name: self.totals[name] for name in _SAMPLED}
        if before is None:
            return Sample(
                time=self.time, busy_seconds=0.0, stall_seconds=0.0, stalled=self.totals["stall_seconds"], **counted
            )
        busy = self.time - before.time if counted["tokens"] > before.tokens else 0.0
        stalled = self.totals["stall_seconds"]
        return Sample(
            time=self.time,
            busy_seconds=before.busy_seconds + busy,
            stall_seconds=before.stall_seconds + max(0.0, stalled - before.stalled) / max(1, self.parallel),
            stalled=stalled,
            **counted,
        )


def models_of_reports(reports: Iterable[WorkerReport]) -> list[Model]:
    """Those that are served, then those that draft for them; engines of the same model together.

    Args:
        reports: as ``read_reports`` sorts them.
    """
    groups: dict[tuple[bool, str], list[WorkerReport]] = {}
    for report in reports:
        groups.setdefault((report.role == Role.DRAFTER, _name(report)), []).append(report)
    return [Model.of(name, members) for (_, name), members in sorted(groups.items(), key=lambda item: item[0])]


def _name(report: WorkerReport) -> str:
    if report.role == Role.DRAFTER:
        return f"{report.model} (drafts for {report.served_model})"
    return report.served_model or report.model


def _replicas(reports: Iterable[WorkerReport]) -> Iterator[list[WorkerReport]]:
    """Ranks of one data-parallel replica of one engine together."""
    for _, ranks in groupby(reports, key=lambda report: (report.engine, report.replica)):
        yield list(ranks)


def _of_replicas(reports: Iterable[WorkerReport], name: str) -> list[Number]:
    together = max if name in _ONCE_PER_REPLICA else sum
    return [together([report.stats.get(name, 0) for report in ranks]) for ranks in _replicas(reports)]
