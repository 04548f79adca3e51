"""What a daemon's status looks like to a person. It must not ask the daemon anything."""

from rich.console import Group, RenderableType
from rich.table import Table

from vllm_moe_offload.ipc.protocol import ModelStatus, StatusReport, WorkerStatus
from vllm_moe_offload.store.files import size_text

_MODEL_COLUMNS = (
    "model",
    "store",
    "resident",
    "limit",
    "all",
    "workers",
    "loads",
    "joined",
    "useful",
    "late",
    "wasted",
    "history",
)
_WORKER_COLUMNS = ("worker", "pid", "engine", "rank", "store", "hits", "misses", "stalled", "steps", "tokens")
_STORE_DIGITS = 12


def status_view(report: StatusReport) -> RenderableType:
    """One line about the daemon, a table of its models, a table of their workers."""
    resident = sum(model.resident_bytes for model in report.models)
    headline = (
        f"pid {report.pid}, up {_duration(report.uptime_seconds)}, "
        f"{size_text(resident)} of {size_text(report.budget_bytes)} in use"
    )
    lines = [headline, *(f"a thread has ended by an error: {failed}" for failed in report.failed_threads)]
    if not report.models:
        return Group(*lines, "no model has been attached yet")
    return Group(*lines, _models(report.models), _workers(report.models))


def _models(models: list[ModelStatus]) -> Table:
    table = _table(_MODEL_COLUMNS)
    for model in models:
        counters = (model.counters.get(name, 0) for name in ("loads", "joined", "useful", "late", "wasted"))
        table.add_row(
            model.model or "-",
            model.store[:_STORE_DIGITS],
            f"{model.resident} ({size_text(model.resident_bytes)})",
            f"{model.limit} ({size_text(model.limit_bytes)})",
            f"{model.experts} ({size_text(model.record_bytes)})",
            str(len(model.workers)),
            *map(str, counters),
            f"{model.history_requests} ({model.history_tokens} tokens)",
        )
    return table


def _workers(models: list[ModelStatus]) -> Table:
    table = _table(_WORKER_COLUMNS)
    for model in models:
        for worker in model.workers:
            table.add_row(*_worker_row(model, worker))
    return table


def _worker_row(model: ModelStatus, worker: WorkerStatus) -> tuple[str, ...]:
    count = worker.counters.get
    hits, misses = count("hits", 0), count("misses", 0)
    share = f" ({100 * hits / (hits + misses):.1f}%)" if hits + misses else ""
    return (
        f"{worker.worker}{' (lease)' if worker.lease else ''}",
        str(worker.pid),
        worker.group or "-",
        str(worker.rank),
        model.store[:_STORE_DIGITS],
        f"{hits}{share}",
        str(misses),
        f"{count('stall_us', 0) / 1e6:.1f} s",
        str(count("steps", 0)),
        str(count("tokens", 0)),
    )


def _table(columns: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    return table


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
