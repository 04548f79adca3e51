"""What workers report, on the page of metrics that vLLM serves, whichever of its processes answers."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ..report.engine import engine_id
from ..report.files import read_reports
from ..report.metrics import worker_families
from . import seams
from .engine_config import offload_config


class WorkerCollector(Collector):
    """Of the engines that this process has started or serves. Every scrape reads what their workers have reported."""

    def __init__(self) -> None:
        self._engines: set[str] = set()
        self._is_global = False
        """Whether the registry of processes that answer alone has it."""

    def describe(self) -> list[Metric]:
        """Nothing in advance: labels are known when workers report."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What workers that live have reported last."""
        if not self._engines:
            return iter(())
        return worker_families([report for report in read_reports() if report.engine in self._engines])

    def show(self, engine: str) -> None:
        """Collect of this engine, too."""
        self._engines.add(engine)
        if not self._is_global:
            self._is_global = True
            REGISTRY.register(self)


_COLLECTOR = WorkerCollector()


def install() -> None:
    seams.METRICS_LOGGER.wrap(_show_workers)
    seams.METRICS_OF_PROCESSES.wrap(_collect_workers)


def _show_workers(make_logger: Callable[..., None]) -> Callable[..., None]:
    def make(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        make_logger(self, vllm_config, *args, **kwargs)
        if offload_config(vllm_config) is not None:
            _COLLECTOR.show(engine_id())

    return make


def _collect_workers(collect: Callable[[Any], Iterable[Metric]]) -> Callable[[Any], Iterator[Metric]]:
    """Where several API servers answer, each adds up what all have written to files. All of them show all workers."""

    def collect_all(self: Any) -> Iterator[Metric]:
        yield from collect(self)
        yield from _COLLECTOR.collect()

    return collect_all
