"""What the live page of a daemon shows of the models it keeps."""

from typing import Any

from tests.report.reports import a_report
from vllm_moe_offload.daemon.page import models_of_daemon
from vllm_moe_offload.ipc.protocol import ModelStatus, StatusReport, WorkerStatus
from vllm_moe_offload.stats import MODEL_STATISTICS, WORKER_STATISTICS, Stats

DAEMON = 99


def a_model(store: str, name: str, pids: list[int], **counted: Any) -> ModelStatus:
    stats = Stats().as_dict(WORKER_STATISTICS)
    workers = [WorkerStatus(number, pid, "group", number, False, stats) for number, pid in enumerate(pids)]
    return ModelStatus(store, name, Stats(**counted).as_dict(MODEL_STATISTICS), workers)


def status(*models: ModelStatus) -> StatusReport:
    return StatusReport(DAEMON, 60.0, 1 << 20, list(models), [])


def test_counts_are_the_daemons_and_maps_those_of_its_own_workers() -> None:
    reports = [
        a_report(pid=1, daemon_pid=DAEMON),
        a_report(pid=2, rank=1, daemon_pid=DAEMON),
        a_report(pid=3, engine="another's", daemon_pid=DAEMON + 1),
        a_report(pid=4, engine="alone"),
    ]
    used, kept = models_of_daemon(
        status(a_model("b" * 32, "used", [1, 2, 5], hits=30, tokens=7), a_model("a" * 32, "kept", [], hits=9)), reports
    )[::-1]
    assert (used.name, used.totals["hits"], used.totals["tokens"], used.parallel) == ("used", 30, 7, 3)
    assert [report.pid for report in used.reports] == [1, 2]
    assert (kept.name, kept.totals["hits"], kept.parallel, kept.reports) == ("kept", 9, 0, [])
    assert used.time - used.started == 60


def test_two_stores_of_one_model_are_told_apart() -> None:
    models = models_of_daemon(status(a_model("a" * 32, "same", []), a_model("b" * 32, "same", [])), [])
    assert [model.name for model in models] == ["same (aaaaaaaa)", "same (bbbbbbbb)"]
