"""What a daemon's status looks like to a person. It must not ask the daemon anything."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from vllm_moe_offload.ipc.protocol import ModelStatus, StatusReport, WorkerStatus
from vllm_moe_offload.sizes import size_text

from ..stats import DAEMON, STATISTICS, Number, Statistic

_MODEL_STATISTICS = tuple(each for each in STATISTICS if each.column and DAEMON in each.source)
_WORKER_STATISTICS = tuple(each for each in STATISTICS if each.column and DAEMON not in each.source)
_STORE_DIGITS = 12


def status_view(report: StatusReport) -> RenderableType:
    """One line about the daemon, a table of its models, a table of their workers."""
    resident = sum(model.stats["resident_bytes"] for model in report.models)
    headline = (
        f"pid {report.pid}, up {_duration(report.uptime_seconds)}, "
        f"{size_text(resident)} of {size_text(report.budget_bytes)} in use"
    )
    lines = [headline, *(f"a thread has ended by an error: {failed}" for failed in report.failed_threads)]
    if not report.models:
        return Group(*lines, "no model has been attached yet")
    return Group(*lines, _models(report.models), _workers(report.models))


def _models(models: list[ModelStatus]) -> Table:
    counted = [each.column for each in _MODEL_STATISTICS]
    table = plain_table("model", "store", "resident", "limit", "all", "workers", *counted, "history")
    for model in models:
        stats = model.stats
        table.add_row(
            model.model or "-",
            model.store[:_STORE_DIGITS],
            _amount(stats, "resident_experts", "resident_bytes"),
            _amount(stats, "slots", "slot_bytes"),
            _amount(stats, "experts", "expert_bytes"),
            str(stats["attached_workers"]),
            *_cells(_MODEL_STATISTICS, stats),
            f"{stats['history_requests']} ({stats['history_tokens']} tokens)",
        )
    return table


def _workers(models: list[ModelStatus]) -> Table:
    counted = [each.column for each in _WORKER_STATISTICS]
    table = plain_table("worker", "pid", "engine", "rank", "store", *counted)
    for model in models:
        for worker in model.workers:
            table.add_row(*_worker_row(model, worker))
    return table


def _worker_row(model: ModelStatus, worker: WorkerStatus) -> tuple[str, ...]:
    return (
        f"{worker.worker}{' (lease)' if worker.lease else ''}",
        str(worker.pid),
        worker.group or "-",
        str(worker.rank),
        model.store[:_STORE_DIGITS],
        *_cells(_WORKER_STATISTICS, worker.stats),
    )


def _amount(stats: Mapping[str, Number], count: str, size: str) -> str:
    return f"{stats[count]} ({size_text(stats[size])})"


def _cells(statistics: Sequence[Statistic], stats: Mapping[str, Number]) -> list[str]:
    return [_cell(each, stats) for each in statistics]


def _cell(statistic: Statistic, stats: Mapping[str, Number]) -> str:
    value = stats[statistic.name]
    if statistic.name == "hits" and value:
        return f"{value} ({100 * value / (value + stats['misses']):.1f}%)"
    if statistic.unit == "bytes":
        return size_text(value)
    return f"{value:.1f} s" if statistic.unit == "seconds" else str(value)


def plain_table(*columns: str) -> Table:
    """Without lines; the first two columns are words, the others numbers."""
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    return table


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
