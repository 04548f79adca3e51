"""vLLM's page of metrics shows the workers of the engines that it serves, and nothing where nothing is offloaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tests.report.reports import a_report
from vllm_moe_offload.integration import metrics
from vllm_moe_offload.integration.metrics import WorkerCollector
from vllm_moe_offload.report import ReportFile
from vllm_moe_offload.report.engine import VARIABLE

Pages = tuple[CollectorRegistry, CollectorRegistry, Any]


class OfProcesses(Collector):
    """What several processes have written to files: nothing."""

    collect = metrics._collect_workers(lambda self: ())

    def describe(self) -> list[Metric]:
        return []


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pages:
    """Registries of a process that answers alone and of one of several, and how vLLM makes its logger."""
    alone, several = CollectorRegistry(), CollectorRegistry()
    monkeypatch.setenv("VLLM_MOE_OFFLOAD_REPORTS", str(tmp_path))
    monkeypatch.setattr(metrics, "REGISTRY", alone)
    monkeypatch.setattr(metrics, "_COLLECTOR", WorkerCollector())
    several.register(OfProcesses())
    return alone, several, metrics._show_workers(lambda *_: None)


def an_engine(offloads: bool) -> Any:
    return SimpleNamespace(additional_config={"moe_offload": {"cache": "25%"}} if offloads else {})


def test_workers_of_this_process_s_engines_are_shown_on_every_page(
    pages: Pages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone, several, make_logger = pages
    files = [ReportFile(tmp_path, f"worker {rank}") for rank in range(3)]
    for rank, file in enumerate(files):
        file.write(a_report(engine="mine" if rank < 2 else "other", rank=rank))
    monkeypatch.setenv(VARIABLE, "mine")
    make_logger(None, an_engine(offloads=True))
    make_logger(None, an_engine(offloads=True))
    for page in (generate_latest(alone), generate_latest(several)):
        steps = [line for line in page.decode().splitlines() if line.startswith("vllm:moe_offload_steps_total{")]
        assert ['rank="0"' in line for line in steps] == [True, False], steps
    for file in files:
        file.close()
    assert b"vllm:moe_offload_steps_total{" not in generate_latest(alone), "their workers have ended"


def test_nothing_is_registered_where_nothing_is_offloaded(
    pages: Pages,
) -> None:
    alone, several, make_logger = pages
    make_logger(None, an_engine(offloads=False))
    assert generate_latest(alone) == generate_latest(several) == b""
