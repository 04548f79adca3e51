"""docs/metrics.md, the dashboard and the alerts name the metrics that there are, with the labels that they have."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.report.reports import a_report
from vllm_moe_offload.daemon.metrics import DaemonCollector, described_daemon_metrics
from vllm_moe_offload.ipc.protocol import ModelStatus, StatusReport, WorkerStatus
from vllm_moe_offload.report.metrics import described_worker_metrics, worker_families
from vllm_moe_offload.stats import MODEL_STATISTICS, WORKER_STATISTICS

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "examples" / "grafana"
OURS = re.compile(r"(?:vllm:moe_offload|vllm_moe_offload)_[a-z_]+")
_OF_PROMETHEUS = {"le", "instance", "job"}
"""Labels of buckets, and those that Prometheus adds."""


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Labels by names of samples, of a worker that uses a daemon and of that daemon."""
    worker = WorkerStatus(0, 4711, "group", 0, False, {each.name: 1 for each in WORKER_STATISTICS})
    model = ModelStatus("store", "model", {each.name: 1 for each in MODEL_STATISTICS}, [worker])
    daemon = DaemonCollector(lambda: StatusReport(1, 1.0, 100, [model], []))
    families = [*worker_families([a_report(daemon_pid=4711)]), *daemon.collect()]
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def test_the_documentation_is_up_to_date_and_names_what_is_exported(exported: dict[str, set[str]]) -> None:
    tool = runpy.run_path(str(ROOT / "docs" / "tools" / "metrics.py"))
    text = tool["PAGE"].read_text()
    assert text == tool["page"](), "write it again: python docs/tools/metrics.py"
    documented = set(re.findall(r"^\| `([a-z_:]+)`", text, re.MULTILINE))
    described = [*described_worker_metrics(), *described_daemon_metrics()]
    assert documented == {each.name for each in described}
    assert documented == {re.sub("_(bucket|count|sum)$", "", name) for name in exported}
    for name in OURS.findall(text):
        assert name in documented or name == "vllm_moe_offload", name


def expressions() -> Iterator[tuple[str, str]]:
    """Where each is, and the expression."""
    dashboard = json.loads((GRAFANA / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]
    for group in yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


@pytest.mark.parametrize("where, expression", list(expressions()))
def test_dashboard_and_alerts_ask_for_what_is_exported(
    where: str, expression: str, exported: dict[str, set[str]]
) -> None:
    names = OURS.findall(expression)
    assert names, "a query of nothing of ours"
    assert set(names) <= exported.keys()
    labels = {*exported[names[0]].union(*(exported[name] for name in names)), *_OF_PROMETHEUS}
    matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    grouped = re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", expression)
    listed = [label.strip() for group in grouped for label in group.split(",")]
    asked = re.findall(r"label_values\(.*, (\w+)\)", expression)
    assert set(matched) | set(listed) | set(asked) <= labels


def test_the_dashboard_covers_what_a_user_asks_about() -> None:
    shown = {name for _, expression in expressions() for name in OURS.findall(expression)}
    wanted = ("stall_seconds", "hits", "misses", "moved_bytes", "prefetch_useful", "evictions", "failed_requests")
    assert {f"vllm:moe_offload_{name}_total" for name in wanted} <= shown


def test_panels_are_named_and_do_not_lie_on_each_other() -> None:
    panels = json.loads((GRAFANA / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places) and all(panel["title"] for panel in panels)
