"""What workers report is in Prometheus: every statistic, under vLLM's labels, and nothing that is not described."""

import re

from prometheus_client.core import Metric

from tests.report.reports import a_report
from vllm_moe_offload.report import Prediction, Role
from vllm_moe_offload.report.metrics import LABELS, PREFIX, described_worker_metrics, worker_families
from vllm_moe_offload.stats import STATISTICS, WORKER_STATISTICS


def families(*reports: object) -> dict[str, Metric]:
    return {family.name: family for family in worker_families(reports)}  # type: ignore[arg-type]


def values(family: Metric, **labels: str) -> dict[str, float]:
    return {sample.name: sample.value for sample in family.samples if labels.items() <= sample.labels.items()}


def test_every_statistic_of_every_worker_is_there_under_vllm_s_labels() -> None:
    first, second = a_report(), a_report(rank=1, stats={each.name: 500 for each in WORKER_STATISTICS})
    found = families(first, second)
    for rank, report in (("0", first), ("1", second)):
        labels = {"model_name": "tiny-moe", "engine": "0", "rank": rank, "role": "target"}
        assert set(labels) == set(LABELS)
        for statistic in WORKER_STATISTICS:
            metric, text, own = statistic.part or (statistic.name, statistic.help, {})
            family = found[PREFIX + metric]
            assert (family.documentation, family.type) == (text, statistic.kind)
            assert list(values(family, **labels, **own).values()) == [report.stats[statistic.name]]


def test_what_is_exported_is_what_is_described() -> None:
    found = families(a_report(daemon_pid=4711))
    described = described_worker_metrics()
    assert {
        re.sub("_(bucket|sum|count)$", "", sample.name) for family in found.values() for sample in family.samples
    } == {each.name for each in described}
    assert len({each.name for each in described}) == len(described)
    for each in described:
        family = found[each.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (each.kind, each.help)
        assert all(sample.labels.keys() - {"le"} == {*each.labels, *each.own_labels} for sample in family.samples)
        assert re.fullmatch(r"vllm:moe_offload_[a-z_]+", each.name)


def test_histograms_add_up_to_their_last_bucket() -> None:
    (name, family) = next((name, one) for name, one in families(a_report()).items() if "step_stall" in name)
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name == f"{name}_bucket"}
    assert (buckets["0.1"], buckets["0.25"], buckets["10.0"], buckets["+Inf"]) == (0, 1, 1, 1)
    assert list(buckets.values()) == sorted(buckets.values())
    assert (values(family)[f"{name}_sum"], values(family)[f"{name}_count"]) == (0.25, 1)


def test_states_are_ones_and_zeros() -> None:
    paused = families(a_report(prediction=Prediction.PAUSED, role=Role.DRAFTER, daemon_pid=0))
    samples = paused[f"{PREFIX}prediction"].samples
    assert {(sample.labels["state"], sample.value) for sample in samples} == {("on", 0), ("paused", 1), ("off", 0)}
    assert {sample.labels["predictor"] for sample in samples} == {"history"}
    assert {sample.labels["role"] for sample in samples} == {"drafter"}
    for daemon_pid, attached in ((None, []), (0, [0]), (7, [1])):
        (family,) = [each for each in worker_families([a_report(daemon_pid=daemon_pid)]) if "attached" in each.name]
        assert [sample.value for sample in family.samples] == attached


def test_parts_of_a_metric_are_told_apart_by_their_labels() -> None:
    parts = [(each.part.metric, *sorted(each.part.labels.items())) for each in STATISTICS if each.part is not None]
    assert len(set(parts)) == len(parts) > 1
    assert not {metric for metric, *_ in parts} & {each.name for each in STATISTICS if each.part is None}
