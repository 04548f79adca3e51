"""What `doctor` says of engines that run, from what their workers report. It must not ask them anything."""

import time
from collections.abc import Iterator, Sequence

from ..page.summary import STALE_SECONDS
from ..report import WorkerReport
from .check import OK, WARNING, Check


def check_engines(reports: Sequence[WorkerReport]) -> Iterator[Check]:
    """Whether all threads of their workers live."""
    subject, now = "running engines", time.time()
    if not reports:
        yield Check(subject, OK, "none of this user offloads now")
        return
    faults = [each for report in reports for each in _faults(report, now)]
    yield from faults
    if not faults:
        engines = len({report.engine for report in reports})
        yield Check(subject, OK, f"{engines}, with {len(reports)} workers that report; all of their threads are alive")


def _faults(report: WorkerReport, now: float) -> Iterator[Check]:
    worker = f"worker {report.rank} (pid {report.pid}) of {report.served_model or report.model}"
    if failed := report.stats.get("failed_threads", 0):
        detail = f"{worker}: {failed} of its threads have ended by an error"
        yield Check("running engines", WARNING, detail, "its log has the error; restart the engine")
    if now - report.time > STALE_SECONDS:
        detail = f"{worker} is running and has not reported for {now - report.time:.0f} s"
        yield Check("running engines", WARNING, detail, "see its log; restart the engine if it does not answer")
