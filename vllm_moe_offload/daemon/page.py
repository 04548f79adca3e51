"""What the live page shows of a daemon: the models it keeps, and what the workers attached to it report."""

import time
from collections.abc import Iterable

from ..ipc.protocol import ModelStatus, StatusReport
from ..page import Model
from ..report import WorkerReport
from ..stats import STATISTICS


def models_of_daemon(status: StatusReport, reports: Iterable[WorkerReport]) -> list[Model]:
    """By name. Counts are the daemon's; maps and requests are there for workers whose reports can be read.

    Args:
        reports: as ``read_reports`` sorts them.
    """
    ours = [report for report in reports if report.daemon_pid == status.pid]
    now = time.time()
    several = len({model.model for model in status.models}) < len(status.models)
    return sorted(
        (_model(model, ours, now - status.uptime_seconds, now, several) for model in status.models),
        key=lambda model: model.name,
    )


def _model(model: ModelStatus, reports: list[WorkerReport], started: float, now: float, several: bool) -> Model:
    pids = {worker.pid for worker in model.workers}
    return Model(
        name=f"{model.model} ({model.store[:8]})" if several else model.model,
        started=started,
        time=now,
        totals=dict.fromkeys((each.name for each in STATISTICS), 0) | model.stats,
        parallel=len(model.workers),
        reports=[report for report in reports if report.pid in pids],
    )
