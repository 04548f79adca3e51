"""Statistics and reports as metrics of Prometheus, and what the documentation says of each."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from ..stats import WORKER_STATISTICS, Number, Statistic
from .report import Histogram, Prediction, WorkerReport

PREFIX = "vllm:moe_offload_"
"""As vLLM's own on the same page; ``LLM.get_metrics`` shows no others."""
LABELS = ("model_name", "engine", "rank", "role")
"""The first two as vLLM's own metrics have them; the worker's rank, and whether its model is served or drafts."""

Row = tuple[Sequence[str], Mapping[str, Number]]
"""Values of labels, and statistics by name."""


class Described(NamedTuple):
    """A metric, as documentation has it."""

    name: str
    """As it is queried, but for the suffixes of a histogram."""
    kind: str
    help: str
    labels: tuple[str, ...]
    """That all metrics of its kind have."""
    own_labels: tuple[str, ...] = ()
    """That it has besides."""


class MetricGroup(NamedTuple):
    """The statistics of one metric."""

    metric: str
    kind: str
    help: str
    labels: tuple[str, ...]
    """That tell the statistics apart."""
    statistics: list[Statistic]

    @property
    def sample(self) -> str:
        """Name of its samples."""
        return f"{self.metric}_total" if self.kind == "counter" else self.metric


def groups(statistics: Iterable[Statistic]) -> list[MetricGroup]:
    """Metrics in the order of their first statistics."""
    found: dict[str, MetricGroup] = {}
    for each in statistics:
        if each.part is None:
            found[each.name] = MetricGroup(each.name, each.kind, each.help, (), [each])
        else:
            metric, text, labels = each.part
            group = found.setdefault(metric, MetricGroup(metric, each.kind, text, tuple(labels), []))
            group.statistics.append(each)
    return list(found.values())


def statistic_families(
    prefix: str, statistics: Iterable[Statistic], labels: tuple[str, ...], rows: Sequence[Row]
) -> Iterator[Metric]:
    """The metrics of ``statistics``, with a sample for each row and each of their labels."""
    for group in groups(statistics):
        kind = CounterMetricFamily if group.kind == "counter" else GaugeMetricFamily
        family = kind(f"{prefix}{group.metric}", group.help, labels=(*labels, *group.labels))
        for values, numbers in rows:
            for each in group.statistics:
                own = [] if each.part is None else list(each.part.labels.values())
                family.add_metric([*values, *own], numbers[each.name])
        yield family


_STEP_STALLS = Described("step_stall_seconds", "histogram", "How long each forward pass waited for experts.", LABELS)
_REQUEST_STALLS = Described(
    "request_stall_seconds",
    "histogram",
    "How long finished requests waited for experts, over all forward passes that they took part in.",
    LABELS,
)
_PREDICTION = Described(
    "prediction",
    "gauge",
    "1 for what prediction does now: on; paused, because it has not paid lately; off. 0 for the others.",
    LABELS,
    ("predictor", "state"),
)
_DAEMON = Described(
    "daemon_attached",
    "gauge",
    "1 while the daemon keeps this worker's experts, 0 while it is away; absent where the worker keeps its own.",
    LABELS,
)


def worker_families(reports: Sequence[WorkerReport]) -> Iterator[Metric]:
    """The metrics of an engine's workers: every statistic that workers count, and what else they report."""
    rows = [(_labels(report), report.stats) for report in reports]
    yield from statistic_families(PREFIX, WORKER_STATISTICS, LABELS, rows)
    for described, name in ((_STEP_STALLS, "step_stalls"), (_REQUEST_STALLS, "request_stalls")):
        histogram = HistogramMetricFamily(PREFIX + described.name, described.help, labels=described.labels)
        for report in reports:
            counted: Histogram = getattr(report, name)
            histogram.add_metric(_labels(report), _buckets(counted), counted.sum)
        yield histogram
    prediction = GaugeMetricFamily(
        PREFIX + _PREDICTION.name, _PREDICTION.help, labels=(*_PREDICTION.labels, *_PREDICTION.own_labels)
    )
    daemon = GaugeMetricFamily(PREFIX + _DAEMON.name, _DAEMON.help, labels=_DAEMON.labels)
    for report in reports:
        for state in Prediction:
            prediction.add_metric([*_labels(report), report.predictor, state.value], int(report.prediction == state))
        if report.daemon_pid is not None:
            daemon.add_metric(_labels(report), int(report.daemon_pid != 0))
    yield from (prediction, daemon)


def described_worker_metrics() -> list[Described]:
    """What ``worker_families`` yields."""
    statistics = [
        Described(PREFIX + group.sample, group.kind, group.help, LABELS, group.labels)
        for group in groups(WORKER_STATISTICS)
    ]
    others = (_STEP_STALLS, _REQUEST_STALLS, _PREDICTION, _DAEMON)
    return statistics + [each._replace(name=PREFIX + each.name) for each in others]


def _labels(report: WorkerReport) -> list[str]:
    return [report.served_model, str(report.replica), str(report.rank), report.role.value]


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    buckets, total = [], 0
    for bound, count in zip([*histogram.bounds, float("inf")], histogram.counts, strict=True):
        total += count
        buckets.append((floatToGoString(bound), float(total)))
    return buckets
