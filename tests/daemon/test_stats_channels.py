"""Every statistic of stats.py arrives wherever they are looked at: shared table, status, JSON, top, Prometheus."""

from collections.abc import Mapping
from contextlib import closing
from io import StringIO
from pathlib import Path

import msgspec
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console

from tests.daemon.past import FINGERPRINT, SHAPE, past_request
from tests.daemon.reading_worker import Reader
from tests.daemon.serving import serving
from tests.runtime.record_stores import ALIGNED, build_store
from vllm_moe_offload.cli.daemon_view import status_view
from vllm_moe_offload.client.connection import Connection
from vllm_moe_offload.daemon.metrics import PREFIX, DaemonCollector, described_daemon_metrics
from vllm_moe_offload.ipc.protocol import GetStatus, OpenHistory, Remember, StatusReport
from vllm_moe_offload.ipc.trace_codec import pack_trace
from vllm_moe_offload.stats import DAEMON, MODEL_STATISTICS, STATISTICS, WORKER_STATISTICS, Number, Statistic, Stats

DRIVEN_WORKER = (
    *("hits", "misses", "stall_seconds", "steps", "tokens", "loads", "loaded_bytes", "streamed"),
    *("prefetches", "prefetch_useful", "prefetch_wasted"),
)
"""Those that serving random steps makes non-zero; integration, damage or chance count the others."""
DRIVEN_POOL = ("demands", "missed_bytes", "loads", "loaded_bytes", "streamed", "prefetches", "prefetch_useful")


@pytest.fixture
def report(tmp_path: Path) -> StatusReport:
    """Of a daemon with one worker that has served steps; what these could not count has been counted by hand."""
    made = build_store(tmp_path / "stores", [(ALIGNED, 24)] * 8)
    socket = tmp_path / "daemon.sock"
    with (
        serving(socket, made.store.path.parent) as models,
        closing(Connection.connect(socket, "history", 10)) as history,
    ):
        reader = Reader(socket, made.store.path, seed=1)
        for _ in range(60):
            reader.step()
        with closing(Connection.connect(socket, "history", 10)) as history:
            history.request(OpenHistory(FINGERPRINT, SHAPE, made.store.path.name))
            history.request(Remember(pack_trace(past_request(1))))
        (model,) = models._models.values()
        for stats, driven in ((reader.stats, DRIVEN_WORKER), (model.pools[0].stats, DRIVEN_POOL)):
            assert all(getattr(stats, name) > 0 for name in driven)
            for number, statistic in enumerate(STATISTICS):
                if not getattr(stats, statistic.name):
                    setattr(stats, statistic.name, 1000 + number)
        reader.client.pools["layer 0"].begin_step()  # which shows what was counted before
        with closing(Connection.connect(socket, "control", 10)) as control:
            report = control.request(GetStatus())
        counted = reader.stats.as_dict(WORKER_STATISTICS)
        assert report.models[0].workers[0].stats == pytest.approx(counted, abs=1e-6)
        reader.close()
        return report


def test_every_statistic_is_in_the_status_and_in_its_json(report: StatusReport) -> None:
    again = msgspec.json.decode(msgspec.json.encode(report), type=StatusReport)
    assert again == report
    (model,) = again.models
    (worker,) = model.workers
    assert set(model.stats) == {each.name for each in MODEL_STATISTICS}
    assert set(worker.stats) == {each.name for each in WORKER_STATISTICS}
    assert all(model.stats[each.name] > 0 for each in MODEL_STATISTICS), model.stats
    assert all(worker.stats[each.name] > 0 for each in WORKER_STATISTICS), worker.stats
    for statistic in MODEL_STATISTICS:
        if DAEMON not in statistic.source:
            assert model.stats[statistic.name] == worker.stats[statistic.name], "the sum over the only worker"


def test_every_statistic_is_in_prometheus_under_its_name_with_its_help(report: StatusReport) -> None:
    registry = CollectorRegistry()
    registry.register(DaemonCollector(lambda: report))
    families = {family.name: family for family in registry.collect()}
    (model,) = report.models
    (worker,) = model.workers
    for prefix, statistics, stats in (
        (PREFIX, MODEL_STATISTICS, model.stats),
        (f"{PREFIX}_worker", WORKER_STATISTICS, worker.stats),
    ):
        for statistic in statistics:
            metric, text, labels = statistic.part or (statistic.name, statistic.help, {})
            family = families[f"{prefix}_{metric}"]
            assert (family.documentation, family.type) == (text, statistic.kind)
            (sample,) = [sample for sample in family.samples if labels.items() <= sample.labels.items()]
            assert sample.value == stats[statistic.name] > 0 and sample.labels["store"] == model.store
    exported = {sample.name for family in families.values() for sample in family.samples}
    assert exported == {described.name for described in described_daemon_metrics()}


def test_every_statistic_with_a_heading_is_in_top(report: StatusReport) -> None:
    (model,) = report.models
    rows = StringIO()
    Console(file=rows, width=400).print(status_view(report))
    lines = rows.getvalue().splitlines()

    def check(statistics: list[Statistic], stats: Mapping[str, Number]) -> None:
        headings = next(number for number, line in enumerate(lines) if statistics[0].column in line.split())
        for statistic in statistics:
            assert statistic.column in lines[headings].split()
            value = stats[statistic.name]
            assert (f"{value:.1f}" if statistic.unit == "seconds" else str(value)) in lines[headings + 1].split()

    shown = [each for each in STATISTICS if each.column]
    check([each for each in shown if DAEMON in each.source], model.stats)
    check([each for each in shown if DAEMON not in each.source], model.workers[0].stats)


def test_words_in_shared_memory_hold_a_worker_s_numbers() -> None:
    stats = Stats(**{each.name: 2 + number for number, each in enumerate(WORKER_STATISTICS)})
    stats.stall_seconds = 1.000002
    words = np.array(stats.to_words(), np.int64)
    assert Stats.from_words(words.tolist()) == stats


def test_counters_add_up_and_gauges_do_not() -> None:
    total = Stats(hits=1, slots=5).merge([Stats(hits=2, slots=7), Stats(hits=4, stall_seconds=0.5)])
    assert total == Stats(hits=7, slots=5, stall_seconds=0.5)
