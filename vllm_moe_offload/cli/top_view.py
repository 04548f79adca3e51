"""What one model of an engine looks like in a terminal."""

from rich.console import Group, RenderableType
from rich.markup import escape

from ..page.summary import State, percent
from ..page.view import ModelView
from ..report import RequestReport
from ..sizes import size_text
from .daemon_view import plain_table

_COLOURS = {State.GOOD: "green", State.WAITING: "yellow", State.PROBLEM: "red"}
_MOST_REQUESTS = 8


def model_view(model: ModelView) -> RenderableType:
    """What is going on, what would help, figures, workers, requests."""
    colour = _COLOURS.get(model.summary.state, "default")
    lines = [f"[bold]{escape(model.name)}[/]: [{colour}]{escape(model.summary.sentence)}[/]"]
    lines += [f"  → {escape(advice)}" for advice in model.summary.advice]
    parts: list[RenderableType] = [*lines, _figures(model), _prediction(model)]
    if len(model.workers) > 1:
        parts.append(_workers(model))
    if model.requests:
        parts.append(_requests(model.requests[:_MOST_REQUESTS]))
    return Group(*parts)


def _figures(model: ModelView) -> RenderableType:
    table = plain_table("", "tokens", "in memory", "waited", "read", "useful / late / wasted prefetches")
    recent, totals = model.recent, model.totals
    if recent is not None:
        seconds = max(recent.time, 1e-9)
        table.add_row(
            "last minute",
            f"{recent.tokens / seconds:.1f}/s",
            "-" if recent.hit_rate is None else percent(recent.hit_rate),
            percent(recent.waiting) if recent.busy_seconds else "-",
            f"{size_text(recent.loaded_bytes / seconds)}/s",
            "",
        )
    uses = totals["hits"] + totals["misses"]
    table.add_row(
        "since the start",
        f"{totals['tokens']:,}",
        percent(totals["hits"] / uses) if uses else "-",
        f"{totals['stall_seconds']:.1f} s",
        size_text(totals["loaded_bytes"]),
        f"{totals['prefetch_useful']} / {totals['prefetch_late']} / {totals['prefetch_wasted']}",
    )
    return table


def _prediction(model: ModelView) -> str:
    totals = model.totals
    slots = f"{totals['slots']:,} slots for {totals['experts']:,} experts ({size_text(totals['slot_bytes'])})"
    where = "kept by the daemon" if model.daemon else "of each worker"
    reason = f" ({model.prediction_reason})" if model.prediction_reason else ""
    history = f"{totals['history_requests']:,} requests remembered"
    return escape(f"{slots}, {where}; predictor {model.predictor}: {model.prediction}{reason}; {history}")


def _workers(model: ModelView) -> RenderableType:
    table = plain_table("engine", "rank", "replica", "pid", "hits", "misses", "waited")
    for worker in model.workers:
        numbers = (worker.rank, worker.replica, worker.pid, worker.hits, worker.misses)
        table.add_row(worker.engine, *map(str, numbers), f"{worker.stall_seconds:.1f} s")
    return table


def _requests(requests: list[RequestReport]) -> RenderableType:
    table = plain_table("request", "state", "steps", "tokens", "experts", "misses", "waited")
    for request in requests:
        numbers = (request.steps, request.tokens, request.experts, request.misses)
        state = "running" if request.running else "ended"
        table.add_row(request.id, state, *map(str, numbers), f"{request.stall_seconds:.2f} s")
    return table
