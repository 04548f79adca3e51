"""The daemon's statistics for Prometheus, on this machine's own address only. It must never change anything."""

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..ipc.protocol import StatusReport, WorkerStatus
from ..report.metrics import Described, groups, statistic_families
from ..stats import MODEL_STATISTICS, WORKER_STATISTICS

PREFIX = "vllm_moe_offload_daemon"

_LABELS = ("store", "model")
_THREADS_HELP = "Threads of the daemon that have ended by an exception."
_BUDGET_HELP = "Memory for experts the daemon was given."
_WORKER_LABELS = (*_LABELS, "worker", "pid", "group", "rank")


class DaemonCollector(Collector):
    """Every scrape is one look at the daemon's status."""

    def __init__(self, status: Callable[[], StatusReport]) -> None:
        self._status = status

    def describe(self) -> list[Metric]:
        """Nothing in advance: labels are known when a model is attached."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The budget, then every statistic of models, then every statistic of attached workers."""
        report = self._status()
        budget = GaugeMetricFamily(f"{PREFIX}_budget_bytes", _BUDGET_HELP)
        budget.add_metric([], report.budget_bytes)
        yield budget
        threads = GaugeMetricFamily(f"{PREFIX}_failed_threads", _THREADS_HELP)
        threads.add_metric([], len(report.failed_threads))
        yield threads
        models = [((model.store, model.model), model.stats) for model in report.models]
        yield from statistic_families(f"{PREFIX}_", MODEL_STATISTICS, _LABELS, models)
        workers = [
            ((model.store, model.model, *_values(worker)), worker.stats)
            for model in report.models
            for worker in model.workers
        ]
        yield from statistic_families(f"{PREFIX}_worker_", WORKER_STATISTICS, _WORKER_LABELS, workers)


def described_daemon_metrics() -> list[Described]:
    """What a ``DaemonCollector`` yields."""
    found = [
        Described(f"{PREFIX}_budget_bytes", "gauge", _BUDGET_HELP, ()),
        Described(f"{PREFIX}_failed_threads", "gauge", _THREADS_HELP, ()),
    ]
    for infix, statistics, labels in (("", MODEL_STATISTICS, _LABELS), ("worker_", WORKER_STATISTICS, _WORKER_LABELS)):
        found += [
            Described(f"{PREFIX}_{infix}{group.sample}", group.kind, group.help, labels, group.labels)
            for group in groups(statistics)
        ]
    return found


def _values(worker: WorkerStatus) -> list[str]:
    """Of the labels of a worker."""
    return [str(worker.worker), str(worker.pid), worker.group, str(worker.rank)]
