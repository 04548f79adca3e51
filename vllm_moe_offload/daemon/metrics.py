"""The daemon's statistics for Prometheus, on this machine's own address only. It must never change anything."""

from collections.abc import Callable, Iterator
from http.server import HTTPServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..errors import ConfigError
from ..ipc.protocol import StatusReport
from ..stats import MODEL_STATISTICS, WORKER_STATISTICS, Statistic

ADDRESS = "127.0.0.1"
PREFIX = "vllm_moe_offload_daemon"

_LABELS = ("store", "model")
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
        budget = GaugeMetricFamily(f"{PREFIX}_budget_bytes", "Memory for experts the daemon was given.")
        budget.add_metric([], report.budget_bytes)
        yield budget
        for statistic in MODEL_STATISTICS:
            family = _family(statistic, f"{PREFIX}_{statistic.name}", _LABELS)
            for model in report.models:
                family.add_metric([model.store, model.model], model.stats[statistic.name])
            yield family
        for statistic in WORKER_STATISTICS:
            family = _family(statistic, f"{PREFIX}_worker_{statistic.name}", _WORKER_LABELS)
            for model in report.models:
                for worker in model.workers:
                    numbers = (str(worker.worker), str(worker.pid), worker.group, str(worker.rank))
                    family.add_metric([model.store, model.model, *numbers], worker.stats[statistic.name])
            yield family


def serve_metrics(port: int, status: Callable[[], StatusReport]) -> HTTPServer:
    """Answer scrapes on a port of this machine's own address, from a thread of its own.

    Returns:
        The server; ``shutdown`` ends it.

    Raises:
        ConfigError: the port cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(DaemonCollector(status))
    try:
        server, _ = start_http_server(port, ADDRESS, registry)
    except OSError as error:
        raise ConfigError(f"--metrics-port {port}: cannot listen at {ADDRESS}:{port}: {error.strerror}") from None
    return server


def _family(statistic: Statistic, name: str, labels: tuple[str, ...]) -> CounterMetricFamily | GaugeMetricFamily:
    family = CounterMetricFamily if statistic.kind == "counter" else GaugeMetricFamily
    return family(name, statistic.help, labels=labels)
