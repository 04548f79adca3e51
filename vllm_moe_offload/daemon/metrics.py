"""What the daemon counts, for Prometheus, on this machine's own address only. It must never change anything."""

from collections.abc import Callable, Iterator
from http.server import HTTPServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..errors import ConfigError
from ..ipc.protocol import ModelStatus, StatusReport

ADDRESS = "127.0.0.1"
PREFIX = "vllm_moe_offload_daemon"

_LABELS = ("store", "model")
_WORKER_LABELS = (*_LABELS, "worker", "pid", "group", "rank")
_GAUGES: dict[str, tuple[str, Callable[[ModelStatus], float]]] = {
    "experts": ("Experts of the model.", lambda model: model.experts),
    "record_bytes": ("Bytes of all experts together.", lambda model: model.record_bytes),
    "limit_bytes": ("Bytes of experts that may be resident at present.", lambda model: model.limit_bytes),
    "resident_bytes": ("Bytes of experts that are resident.", lambda model: model.resident_bytes),
    "resident_experts": ("Experts that are resident.", lambda model: model.resident),
    "attached_workers": ("Engine workers that use the model now.", lambda model: len(model.workers)),
    "history_requests": ("Requests the model's history holds.", lambda model: model.history_requests),
    "history_tokens": ("Tokens the model's history holds.", lambda model: model.history_tokens),
}


class DaemonCollector(Collector):
    """Every scrape is one look at the daemon's status."""

    def __init__(self, status: Callable[[], StatusReport]) -> None:
        self._status = status

    def describe(self) -> list[Metric]:
        """Nothing in advance: what there is to count is known when a model is attached."""
        return []

    def collect(self) -> Iterator[Metric]:
        report = self._status()
        budget = GaugeMetricFamily(f"{PREFIX}_budget_bytes", "Memory for experts the daemon was given.")
        budget.add_metric([], report.budget_bytes)
        yield budget
        for name, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=_LABELS)
            for model in report.models:
                gauge.add_metric([model.store, model.model], value(model))
            yield gauge
        yield from _counters(report.models)
        yield from _worker_counters(report.models)


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


def _counters(models: list[ModelStatus]) -> Iterator[Metric]:
    """What the daemon did for each model since it was first attached."""
    for name in sorted({name for model in models for name in model.counters}):
        family = CounterMetricFamily(f"{PREFIX}_{name}", f"{name} of the model, by the daemon.", labels=_LABELS)
        for model in models:
            if name in model.counters:
                family.add_metric([model.store, model.model], model.counters[name])
        yield family


def _worker_counters(models: list[ModelStatus]) -> Iterator[Metric]:
    """What each attached worker counted itself; gone when it is."""
    names = {name for model in models for worker in model.workers for name in worker.counters}
    for name in sorted(names):
        family = CounterMetricFamily(f"{PREFIX}_worker_{name}", f"{name} of the worker.", labels=_WORKER_LABELS)
        for model in models:
            for worker in model.workers:
                labels = [model.store, model.model, str(worker.worker), str(worker.pid), worker.group, str(worker.rank)]
                family.add_metric(labels, worker.counters.get(name, 0))
        yield family
